# The second way to build the addon, for machines without CMake; keep the flags equal to CMakeLists.txt.
{
  'targets': [
    {
      'target_name': 'halfbyte',
      'sources': [
        '<!@(node scripts/sources.cjs native .cc)',
        '<!@(node scripts/sources.cjs kernels .cc)',
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
