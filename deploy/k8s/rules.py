"""Prints the PrometheusRules that hold the rules of monitoring/prometheus/rules, for `make k8s-rules`.

Its result is committed, because Argo CD renders what git holds; a test holds the two in step.
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
"""Of each PrometheusRule. Those about Nginx, the machine and Prometheus itself are left out: a cluster has its own."""
LEFT_OUT = {"ClassifierReplicasLost"}
"""Fires when replicas become fewer, as after every canary and by every scaler. A cluster replaces dead pods, and knows
how many there should be: its own alerts are about those that are missing."""


class Dumper(yaml.SafeDumper):
    """Lines of an expression stay lines."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


Dumper.add_representer(str, _text)


def runbooks() -> str:
    """The address before the path of a runbook: a cluster's Alertmanager has not the template that puts it there."""
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
