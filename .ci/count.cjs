// Prints "passed failed skipped" of a jest JSON report, after the names of what failed and the reasons on stderr.
const { readFileSync } = require('node:fs')

const report = JSON.parse(readFileSync(process.argv[2], 'utf8'))
for (const suite of report.testResults) {
  if (suite.status === 'failed') process.stderr.write(`${suite.name}\n${suite.message}\n`)
}
const failed = report.numFailedTests + report.numRuntimeErrorTestSuites
console.log(report.numPassedTests, failed, report.numPendingTests + report.numTodoTests)
