"""Checks what lies in deploy/ as far as that goes without running it: $DKC_CACHE/venv/bin/python tests/deploy.py

Every file parses; the roles know each flag and variable that is set (`dkc ROLE --help`, $DKC_BIN); schemas of Kubernetes,
systemd and Prometheus hold; names that point to each other agree; and every metric that a rule or the board names is shown
by a running `dkc dev`, with the labels that are asked for. Each check is a function whose generator yields what is wrong.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import kubernetes_validate
import yaml

import docs

REPOSITORY = Path(__file__).resolve().parent.parent
DEPLOY = REPOSITORY / "deploy"
ROLES = ["storage-node", "coordinator", "gateway"]
# What a machine without systemd-analyze can still be told about the units.
UNIT_SECTIONS = {"Unit", "Service", "Install"}


def documents(path):
    return [each for each in yaml.safe_load_all(path.read_text()) if each is not None]


def yaml_parses():
    for path in sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")]):
        try:
            documents(path)
        except yaml.YAMLError as error:
            yield f"{path.relative_to(REPOSITORY)}: {error}"


class Role:
    """What a role can be told, from its help."""

    def __init__(self, name):
        said = subprocess.run([os.environ["DKC_BIN"], name, "--help"], capture_output=True, text=True, check=True)
        self.name = name
        self.flags = set(re.findall(r"^\s+(?:-\w, )?(--[a-z-]+)", said.stdout, re.M))
        self.variables = set(re.findall(r"\[env: (DKC_\w+)=", said.stdout))

    def refuses(self, arguments, variables):
        flags = {word.split("=")[0] for word in arguments if word.startswith("--")}
        for unknown in sorted(flags - self.flags | set(filter(is_ours, variables)) - self.variables):
            yield f"dkc {self.name} knows no {unknown}"


def is_ours(variable):
    return variable.startswith("DKC_")


def compose():
    return documents(DEPLOY / "compose.yaml")[0]


def compose_is_what_roles_accept():
    services = compose()["services"]
    counts = {"etcd": 3, "node": 5, "gateway": 2, "coordinator": 2, "prometheus": 1, "grafana": 1}
    for kind, count in counts.items():
        found = sum(1 for name in services if re.sub(r"-\d+$", "", name) == kind)
        if found != count:
            yield f"compose.yaml: {found} of {count} services {kind}"
    roles = {name: Role(name) for name in ROLES}
    for name, service in services.items():
        if service["image"] == "dkc":
            role, *arguments = service["command"]
            for problem in roles[role].refuses(arguments, service["environment"]):
                yield f"compose.yaml: {name}: {problem}"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            exists = (DEPLOY / source).exists() if source.startswith("./") else source in compose()["volumes"]
            if not exists:
                yield f"compose.yaml: {name}: no {source}"


def dockerfile_builds_what_the_sources_need():
    text = (DEPLOY / "Dockerfile").read_text()
    version = re.search(r'^rust-version = "(.*)"', (REPOSITORY / "Cargo.toml").read_text(), re.M)[1]
    if f"FROM rust:{version}-" not in text:
        yield f"Dockerfile: Cargo.toml asks for Rust {version}"
    packages = re.search(r"^PACKAGES=\((.*?)\)", (REPOSITORY / "scripts/setup").read_text(), re.M | re.S)[1].split()
    used = re.search(r"--no-install-recommends(.*?)&&", text, re.S)[1].replace("\\", "").split()
    for unknown in sorted(set(used) - set(packages)):
        yield f"Dockerfile: {unknown} is not among the packages of scripts/setup"


def units_are_what_systemd_and_roles_accept():
    """The units as installed, but for the path of the binary, which must be there to be verified."""
    units = DEPLOY / "systemd"
    for role in ROLES:
        variables = [
            *re.findall(r"^(?:Environment=)?(DKC_\w+)=", (units / f"dkc-{role}.service").read_text(), re.M),
            *re.findall(r"^Environment=(DKC_\w+)=", (units / "dkc-.service.d/common.conf").read_text(), re.M),
            *re.findall(r"^(\w+)=", (units / "dkc/dkc.env").read_text(), re.M),
            *re.findall(r"^(\w+)=", (units / f"dkc/dkc-{role}.env").read_text(), re.M),
        ]
        for problem in Role(role).refuses([], variables):
            yield f"systemd, {role}: {problem}"
    if shutil.which("systemd-analyze") is None:
        print("deploy: NOT CHECKED: no systemd-analyze here; of the units only the names of sections are looked at")
        for unit in [*units.glob("*.service"), *units.glob("*.d/*.conf")]:
            for section in set(re.findall(r"^\[(.*)\]$", unit.read_text(), re.M)) - UNIT_SECTIONS:
                yield f"{unit.name}: no section {section}"
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(units, folder, dirs_exist_ok=True)
        for role in ROLES:
            unit = Path(folder) / f"dkc-{role}.service"
            unit.write_text(unit.read_text().replace("/usr/local/bin/dkc", os.environ["DKC_BIN"]))
            how = {"env": os.environ | {"SYSTEMD_UNIT_PATH": f"{folder}:"}, "capture_output": True, "text": True}
            said = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], **how)
            # It ends with 0 in spite of what it warns of, such as an unknown key; other units of the machine are not ours.
            ours = [line for line in said.stderr.splitlines() if folder in line or "dkc" in line]
            if said.returncode or ours:
                yield f"{unit.name}: systemd-analyze: " + "\n".join(ours or [said.stderr])


def manifests():
    return [each for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")) for each in documents(path)]


def kubernetes_is_what_it_and_roles_accept():
    listed = documents(DEPLOY / "kubernetes/kustomization.yaml")[0]["resources"]
    there = {path.name for path in (DEPLOY / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    if set(listed) != there:
        yield f"kustomization.yaml lists {sorted(listed)}, there are {sorted(there)}"
    resources = [each for each in manifests() if each["kind"] != "Kustomization"]
    shared = next(each["data"] for each in resources if each["kind"] == "ConfigMap")
    pods = {}
    for resource in resources:
        try:
            kubernetes_validate.validate(resource, "1.35", strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{what(resource)}: {str(error).splitlines()[0]}"
        if resource["kind"] in ["Deployment", "StatefulSet"]:
            pods[what(resource)] = resource["spec"]["template"]
            yield from pod_agrees(resource, shared)
    for resource in resources:
        selector = resource.get("spec", {}).get("selector") or {}
        wanted = selector.get("matchLabels", selector)
        chosen = [pod for pod in pods.values() if wanted.items() <= pod["metadata"]["labels"].items()]
        if wanted and len(chosen) != 1:
            yield f"{what(resource)} selects {len(chosen)} kinds of pods"
        if resource["kind"] == "Service":
            known = {port["name"] for pod in chosen for port in pod["spec"]["containers"][0]["ports"]}
            for port in resource["spec"]["ports"]:
                if port["name"] not in known:
                    yield f"{what(resource)}: the pods have no port {port['name']}"


def what(resource):
    return f"{resource['kind']} {resource['metadata']['name']}"


def pod_agrees(resource, shared):
    container = resource["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    variables = {each["name"]: each.get("value", "") for each in container["env"]}
    for probe in ["livenessProbe", "readinessProbe"]:
        if container[probe]["httpGet"]["port"] not in ports:
            yield f"{what(resource)}: {probe}: no such port"
    volumes = {claim["metadata"]["name"] for claim in resource["spec"].get("volumeClaimTemplates", [])}
    if volumes != {mount["name"] for mount in container.get("volumeMounts", [])}:
        yield f"{what(resource)}: mounts other volumes than it claims"
    if container["image"] != "dkc":
        return
    role, *arguments = container["args"]
    for problem in Role(role).refuses(arguments, [*shared, *variables]):
        yield f"{what(resource)}: {problem}"
    for name, variable in [("grpc", "DKC_LISTEN"), ("http", "DKC_HTTP"), ("metrics", "DKC_METRICS")]:
        if name in ports and not variables[variable].endswith(f":{ports[name]}"):
            yield f"{what(resource)}: port {name} is {ports[name]}, {variable} is {variables[variable]}"


def prometheus_accepts_its_files():
    promtool = Path(os.environ["DKC_CACHE"]) / "promtool-2.53/usr/bin/promtool"
    said = subprocess.run([promtool, "check", "config", DEPLOY / "prometheus/prometheus.yml"], capture_output=True, text=True)
    if said.returncode:
        yield f"promtool: {said.stdout}{said.stderr}"


def prometheus_scrapes_what_compose_runs():
    services = compose()["services"]
    for job in documents(DEPLOY / "prometheus/prometheus.yml")[0]["scrape_configs"]:
        for target in job["static_configs"][0]["targets"]:
            name, port = target.split(":")
            listens = services.get(name, {}).get("environment", {})
            wanted = listens.get("DKC_METRICS") or listens.get("ETCD_LISTEN_CLIENT_URLS", "")
            if not wanted.endswith(f":{port}"):
                yield f"prometheus.yml: nothing listens at {target}"


def expressions():
    """What the board and the rules ask for: (where, expression)."""
    for rule in documents(DEPLOY / "prometheus/rules.yml")[0]["groups"][0]["rules"]:
        yield f"rule {rule['alert']}", rule["expr"]
    for panel in json.loads((DEPLOY / "grafana/board.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield f"board, {panel['title']!r}", target["expr"]


def metrics_exist():
    """Some are shown a moment after what they tell of, hence the patience."""
    with tempfile.TemporaryDirectory(prefix="dkc-deploy-") as folder:
        with docs.cluster(Path(folder) / "cluster", docs.Ports()):
            until = time.monotonic() + 10
            while problems := list(missing(scrape(Path(folder) / "cluster/data/cluster.json"))):
                if time.monotonic() > until:
                    break
                time.sleep(0.2)
    yield from problems


def missing(shown):
    for where, expression in expressions():
        for name, matchers in re.findall(r"\b(dkc_\w+)(?:\{(.*?)\})?", expression):
            matched = dict(re.findall(r'(\w+)!?=~?"(.*?)"', matchers))
            job = matched.pop("job", None)
            roles = [role for role in ROLES if job in (None, f"dkc-{role}")]
            labels = set(matched) | labels_of(expression)
            found = [shown[role][name] for role in roles if name in shown[role]]
            if not found:
                yield f"{where}: no {' or '.join(roles)} shows {name}"
            elif not any(labels <= known | {"instance"} for known in found):
                yield f"{where}: {name} has no label among {sorted(labels)}"


def labels_of(expression):
    return {label.strip() for listed in re.findall(r"\bby \((.*?)\)", expression) for label in listed.split(",")}


def scrape(cluster_file):
    """The labels of every metric, by role, once each role has had something to do."""
    shown = {role: {} for role in ROLES}
    processes = json.loads(cluster_file.read_text())["processes"]
    http = next(each["addresses"]["http"] for each in processes if each["role"] == "gateway")
    urllib.request.urlopen(f"http://{http}/v1/counters/deploy/touched/increment", data=b"", timeout=10).read()
    for process in processes:
        if process["role"] not in ROLES:
            continue
        text = urllib.request.urlopen(f"http://{process['addresses']['metrics']}/metrics", timeout=10).read().decode()
        for name, labels in re.findall(r"^(dkc_\w+)(?:\{(.*)\})? ", text, re.M):
            shown[process["role"]].setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return shown


def main():
    checks = [
        yaml_parses,
        compose_is_what_roles_accept,
        dockerfile_builds_what_the_sources_need,
        units_are_what_systemd_and_roles_accept,
        kubernetes_is_what_it_and_roles_accept,
        prometheus_accepts_its_files,
        prometheus_scrapes_what_compose_runs,
        metrics_exist,
    ]
    failed = 0
    for check in checks:
        problems = list(check())
        failed += bool(problems)
        print(f"deploy: {check.__name__.replace('_', ' ')}: {'FAILED' if problems else 'ok'}")
        for problem in problems:
            print(f"  {problem}")
    print(f"deploy: {len(checks) - failed} of {len(checks)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
