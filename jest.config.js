module.exports = {
  testEnvironment: 'node',
  // references in double precision take seconds where many workers share a machine
  testTimeout: 30000,
  roots: ['<rootDir>/test'],
  testMatch: ['**/*.test.ts'],
  moduleNameMapper: {
    '^(\\.{1,2}/.*)\\.js$': '$1',
    '^halfbyte$': '<rootDir>/lib/index.ts',
    '^halfbyte/internal/(.*)\\.js$': '<rootDir>/lib/$1.ts',
  },
  transform: {
    '\\.ts$': [
      '@swc/jest',
      {
        jsc: { parser: { syntax: 'typescript' }, target: 'es2022' },
        module: { type: 'commonjs' },
        sourceMaps: 'inline',
      },
    ],
  },
}
