"""``draftmq doctor``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from trainer_client.doctor import examine, is_healthy

_EXAMPLE = """\b
Example:
  draftmq doctor --broker tcp://HOST:5555 --http HOST:9555"""


@click.command(epilog=_EXAMPLE)
@click.option("--broker", required=True, help="The broker's port for trainers, tcp://HOST:5555.")
@click.option("--http", default="", help="Its HTTP address, HOST:9555, for readiness and clock.")
@click.option("--key", type=click.Path(), help="A trainer's secret key (draftmq keygen).")
@click.option("--broker-key", help="The broker's public key, or its file.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(broker: str, http: str, key: str | None, broker_key: str | None, as_json: bool) -> None:
    """Say what works between this host and a broker, and what to do where it does not."""
    findings = []
    for finding in examine(broker, http=http, key=key, broker_key=broker_key):
        findings.append(finding)
        if not as_json:
            click.echo(str(finding))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    sys.exit(0 if is_healthy(findings) else 1)
