# The second way to build the addon, for machines without CMake; keep the flags equal to CMakeLists.txt.
{
  'variables': { 'cuda%': '<!(node scripts/cuda.cjs build)' },
  'targets': [
    {
      'target_name': 'halfbyte',
      'sources': [
        '<!@(node scripts/sources.cjs native .cc)',
        '<!@(node scripts/sources.cjs kernels/cpu .cc)',
        'kernels/experts.cc',
        'kernels/linear4_group.cc',
      ],
      'include_dirs': ['kernels', '<!(node -p "require(\'node-addon-api\').include_dir")'],
      'defines': [
        'HALFBYTE_VERSION="<!(node -p "require(\'./package.json\').version")"',
        'NAPI_VERSION=8', 'NODE_ADDON_API_CPP_EXCEPTIONS', 'NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS',
      ],
      'cflags_cc!': ['-fno-exceptions', '-fno-rtti', '-std=gnu++17', '-std=gnu++20'],
      'cflags_cc': [
        '-std=c++17', '-O3', '-fvisibility=hidden', '-fvisibility-inlines-hidden', '-Wall', '-Wextra',
        '-Wno-uninitialized', '-Wno-maybe-uninitialized', '-ffp-contract=off', '-fno-math-errno',
      ],
      'ldflags': [
        '-Wl,--exclude-libs,ALL', '-Wl,--gc-sections', '-Wl,-z,nodelete', '-static-libstdc++', '-static-libgcc',
      ],
      'conditions': [
        ['cuda==0', { 'sources': ['kernels/no_cuda.cc'] }, {
          'sources': [
            '<!@(node scripts/sources.cjs kernels/cuda .cc)',
            '<!@(node scripts/sources.cjs kernels/cuda .cu)',
          ],
          'include_dirs': ['<!(node scripts/cuda.cjs include)'],
          'defines': ['HALFBYTE_CUDA_ARCHS="<!(node scripts/cuda.cjs archs)"'],
          'libraries': ['-L<!(node scripts/cuda.cjs lib)', '-lcudart_static', '-lrt', '-lpthread', '-ldl'],
          'rules': [
            {
              'rule_name': 'nvcc',
              'extension': 'cu',
              'message': 'NVCC <(RULE_INPUT_PATH)',
              # make knows nothing of what a rule's file includes: every header is named
              'inputs': [
                '<!@(node scripts/sources.cjs kernels .h)',
                '<!@(node scripts/sources.cjs kernels .cuh)',
              ],
              'outputs': ['<(INTERMEDIATE_DIR)/<(RULE_INPUT_ROOT).cu.o'],
              'process_outputs_as_sources': 1,
              'action': [
                '<!(node scripts/cuda.cjs nvcc)', '-c', '<(RULE_INPUT_PATH)', '-o', '<@(_outputs)', '-std=c++17', '-O3',
                '-Ikernels', '<!(node scripts/cuda.cjs compress)', '-Xcompiler=-fPIC,-fvisibility=hidden,-Wall',
                '<!@(node scripts/cuda.cjs flags)',
              ],
            },
          ],
        }],
      ],
      'xcode_settings': {
        'CLANG_CXX_LANGUAGE_STANDARD': 'c++17',
        'GCC_ENABLE_CPP_EXCEPTIONS': 'YES',
        'GCC_ENABLE_CPP_RTTI': 'YES',
        'GCC_SYMBOLS_PRIVATE_EXTERN': 'YES',
        'OTHER_CPLUSPLUSFLAGS': ['-ffp-contract=off', '-fno-math-errno'],
      },
    },
  ],
}
