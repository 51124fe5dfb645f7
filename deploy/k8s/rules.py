"""Prints the PrometheusRules with the rules of monitoring/prometheus/rules, for `make k8s-rules`.

The output is committed, because Argo CD renders what git holds; a test keeps the two in step.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

MONITORING = Path(__file__).parents[2] / "monitoring"
RULES = MONITORING / "prometheus/rules"
TEMPLATE = MONITORING / "alertmanager/templates/classifier.tmpl"
FILES = {"classifier": ("service.yml", "slo.yml", "model.yml"), "classifier-gpu": ("gpu.yml",)}
"""Rule files of each PrometheusRule. Nginx, the machine and Prometheus itself are left out: a cluster has its own."""
LEFT_OUT = {"ClassifierReplicasLost"}
"""It would fire whenever replicas become fewer, as after every canary and scale-down. A cluster replaces dead pods and
knows how many there should be: its own alerts report missing ones."""


class Dumper(yaml.SafeDumper):
    """Keeps the line breaks of expressions."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


Dumper.add_representer(str, _text)


def runbooks() -> str:
    """The base address of the runbooks: a cluster's Alertmanager lacks the template that would prepend it."""
    found = re.search(r'define "classifier.runbooks" }}(\S+){{ end', TEMPLATE.read_text())
    assert found
    return found[1]


def prometheus_rule(name: str) -> dict[str, Any]:
    groups = [group for file in FILES[name] for group in yaml.safe_load((RULES / file).read_text())["groups"]]
    address = runbooks()
    for group in groups:
        group["rules"] = [rule for rule in group["rules"] if rule.get("alert") not in LEFT_OUT]
        for rule in group["rules"]:
            if "alert" in rule:
                rule["annotations"]["runbook_url"] = address + rule["annotations"]["runbook_url"]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": name},
        "spec": {"groups": groups},
    }


if __name__ == "__main__":
    sys.stdout.write("# Written by `make k8s-rules` from monitoring/prometheus/rules.\n")
    documents = map(prometheus_rule, FILES)
    yaml.dump_all(documents, sys.stdout, Dumper, sort_keys=False, width=10**6, allow_unicode=True)
