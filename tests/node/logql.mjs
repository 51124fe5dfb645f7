// node logql.mjs < QUERIES, one a line: prints those that are no LogQL, by Grafana's own grammar; exit status 1 if any.
import { readFileSync } from "node:fs";
import { parser } from "@grafana/lezer-logql";

const queries = readFileSync(0, "utf8").split("\n").filter(Boolean);
const broken = queries.filter((query) => {
  let found = false;
  parser.parse(query).iterate({ enter: (node) => { found ||= node.type.isError; } });
  return found;
});
for (const query of broken) console.error(query);
process.exit(queries.length && !broken.length ? 0 : 1);
