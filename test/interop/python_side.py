"""What transformers and bitsandbytes make of folders that halfbyte wrote.

python_side.py check NAME...     prints the versions of these modules, or fails with what is missing
python_side.py read DIR OUT      loads DIR, saves it to OUT, and writes OUT/logits.safetensors for the ids in DIR/ids.json
python_side.py write DIR OUT CONFIG   quantises the plain model in DIR as the config.json CONFIG says, then the same
python_side.py decode DIR OUT    without bitsandbytes: unpacks the weights in DIR by what the format says, writes them to
                                 OUT/weights.safetensors, and the logits of transformers' dense model that has them
"""

import glob
import importlib
import json
import os
import sys

STATE = ".quant_state.bitsandbytes__"


def check(*names):
    print(json.dumps({name: importlib.import_module(name).__version__ for name in names}))


def write_logits(model, folder, out):
    import torch
    from safetensors.torch import save_file

    with open(os.path.join(folder, "ids.json"), encoding="utf-8") as file:
        ids = torch.tensor([json.load(file)], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float().cpu().contiguous()
    os.makedirs(out, exist_ok=True)
    save_file({"logits": logits}, os.path.join(out, "logits.safetensors"))


def run(folder, out, config=None):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"device_map": {"": "cuda:0" if torch.cuda.is_available() else "cpu"}}
    if config is not None:
        with open(config, encoding="utf-8") as file:
            saved = json.load(file)["quantization_config"]
        names = [name for name in saved if not name.startswith(("_", "halfbyte_")) and name != "quant_method"]
        options["quantization_config"] = BitsAndBytesConfig(**{name: saved[name] for name in names})
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    write_logits(model, folder, out)
    model.save_pretrained(out)
    quantised = sorted(name for name, module in model.named_modules() if "bit" in type(module).__name__)
    print(json.dumps({"quantised": quantised, "footprint": model.get_memory_footprint()}))


def unpack4(state, name, quant_type):
    """The float values of a 4-bit weight: first element in the high half of a byte, blocks over the flat weight."""
    import torch

    said = json.loads(bytes(state[f"{name}{STATE}{quant_type}"].tolist()))
    absmax = state[f"{name}.absmax"]
    if f"{name}.nested_absmax" in state:
        scales = state[f"{name}.nested_absmax"].repeat_interleave(said["nested_blocksize"])[: absmax.numel()]
        absmax = state[f"{name}.nested_quant_map"][absmax.long()] * scales + said["nested_offset"]
    codes = state[name].view(torch.uint8).flatten()
    values = state[f"{name}.quant_map"][torch.stack([codes >> 4, codes & 15], 1).flatten().long()]
    scales = absmax.repeat_interleave(said["blocksize"])[: values.numel()]
    return (values * scales).reshape(said["shape"])


def decode(folder, out):
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    state = {}
    for path in sorted(glob.glob(os.path.join(folder, "model*.safetensors"))):
        state.update(load_file(path))
    weights = {}
    for name, tensor in state.items():
        types = [other.split(STATE)[1] for other in state if other.startswith(name + STATE)]
        scb = state.get(name[: -len("weight")] + "SCB") if name.endswith(".weight") else None
        if types:
            weights[name] = unpack4(state, name, types[0])
        elif scb is not None:
            weights[name] = tensor.float() * scb[:, None] / 127
        elif not any(part in name for part in (".weight.", ".SCB", ".weight_format")):
            weights[name] = tensor.float()
    config = AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    write_logits(model.eval(), folder, out)
    save_file(weights, os.path.join(out, "weights.safetensors"))
    print(json.dumps({"missing": [name for name in missing if name != "lm_head.weight"], "unexpected": unexpected}))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    {"check": check, "read": run, "write": run, "decode": decode}[command](*arguments)
