"""What transformers and bitsandbytes make of folders that halfbyte wrote.

python_side.py check             prints the versions, or fails with what is missing
python_side.py read DIR OUT      loads DIR, saves it to OUT, and writes OUT/logits.safetensors for the ids in DIR/ids.json
python_side.py write DIR OUT CONFIG   quantises the plain model in DIR as the config.json CONFIG says, then the same
"""

import json
import os
import sys


def check():
    import accelerate
    import bitsandbytes
    import safetensors
    import torch
    import transformers

    modules = (accelerate, bitsandbytes, safetensors, torch, transformers)
    print(json.dumps({m.__name__: m.__version__ for m in modules}))


def run(folder, out, config=None):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"device_map": {"": "cuda:0" if torch.cuda.is_available() else "cpu"}}
    if config is not None:
        with open(config, encoding="utf-8") as file:
            saved = json.load(file)["quantization_config"]
        names = [name for name in saved if not name.startswith(("_", "halfbyte_")) and name != "quant_method"]
        options["quantization_config"] = BitsAndBytesConfig(**{name: saved[name] for name in names})
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with open(os.path.join(folder, "ids.json"), encoding="utf-8") as file:
        ids = torch.tensor([json.load(file)], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float().cpu().contiguous()
    os.makedirs(out, exist_ok=True)
    model.save_pretrained(out)
    save_file({"logits": logits}, os.path.join(out, "logits.safetensors"))
    quantised = sorted(name for name, module in model.named_modules() if "bit" in type(module).__name__)
    print(json.dumps({"quantised": quantised, "footprint": model.get_memory_footprint()}))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "check":
        check()
    else:
        run(*arguments)
