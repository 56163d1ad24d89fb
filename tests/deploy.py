"""Checks the files in deploy/ without deploying them: $DKC_CACHE/venv/bin/python tests/deploy.py

Every file parses; the roles know each flag and variable that is set (`dkc ROLE --help`, $DKC_BIN); the files match the
schemas of Kubernetes, systemd and Prometheus; names that refer to each other agree; and a running `dkc dev` exposes every
metric that a rule or the dashboard uses, with its labels. Each check is a generator that yields a text for each failure.
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
from cases import run_cases

REPOSITORY = Path(__file__).resolve().parent.parent
DEPLOY = REPOSITORY / "deploy"
ROLES = ["storage-node", "coordinator", "gateway"]
# The sections of units, for the check on a machine without systemd-analyze.
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
    """The flags and variables of a role, from its help."""

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


def compose_looks_after_what_it_runs():
    """Docker checks readiness, and neither a log nor a process may use up the machine."""
    services = compose()["services"]
    for name, service in services.items():
        if "max-size" not in service.get("logging", {}).get("options", {}):
            yield f"compose.yaml: {name}: its log is not rotated"
        if "test" not in service.get("healthcheck", {}):
            yield f"compose.yaml: {name}: no health check"
        if "mem_limit" not in service:
            yield f"compose.yaml: {name}: no limit of memory"
        if service["image"] != "dkc":
            continue
        port = service["environment"]["DKC_METRICS"].rsplit(":", 1)[1]
        if service["healthcheck"]["test"] != ["CMD", "dkc", "ready", f"127.0.0.1:{port}"]:
            yield f"compose.yaml: {name}: its health check does not use its DKC_METRICS"
        problem = memory_is_too_small(service["command"][0], service["environment"], service["mem_limit"])
        if problem:
            yield f"compose.yaml: {name}: {problem}"
    version = services["grafana"]["image"].split(":")[1]
    if int(version.split(".")[0]) < 12:
        yield f"compose.yaml: Grafana {version} has known holes"


MIB = 1 << 20


def bytes_of(text):
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi|g|m)", text).groups()
    return int(number) * (MIB << 10 if unit[0].lower() == "g" else MIB)


def memory_is_too_small(role, variables, limit):
    """Returns whether the memory is below the need of a role, as in docs/operations.md, "Size"."""
    if role in ("storage-node", "gateway"):
        wanted = int(variables["DKC_MEMORY_BYTES"]) * 11 // 10
    else:
        wanted = 128 * MIB
    if bytes_of(limit) < wanted:
        return f"it may take {wanted // MIB} MiB, its limit is {limit}"
    return None


def image_names_whose_work_is_in_it():
    """Licences require it. The script that lists them is run here as in the image."""
    text = (DEPLOY / "Dockerfile").read_text()
    if "scripts/third-party" not in text or "/usr/share/doc/dkc/" not in text:
        yield "Dockerfile: no third-party notices in the image"
    said = subprocess.run([REPOSITORY / "scripts/third-party"], capture_output=True, text=True)
    if said.returncode:
        yield f"scripts/third-party: {said.stderr}"
    for wanted in ["tokio ", "rocksdb ", "RocksDB", "LZ4", "jemalloc", "Apache License", "MIT License", "BSD"]:
        if wanted not in said.stdout:
            yield f"scripts/third-party: nothing about {wanted}"


def dockerfile_builds_what_the_sources_need():
    text = (DEPLOY / "Dockerfile").read_text()
    version = re.search(r'^rust-version = "(.*)"', (REPOSITORY / "Cargo.toml").read_text(), re.M)[1]
    if f"FROM rust:{version}-" not in text:
        yield f"Dockerfile: Cargo.toml requires Rust {version}"
    packages = re.search(r"^PACKAGES=\((.*?)\)", (REPOSITORY / "scripts/setup").read_text(), re.M | re.S)[1].split()
    used = re.search(r"--no-install-recommends(.*?)&&", text, re.S)[1].replace("\\", "").split()
    for unknown in sorted(set(used) - set(packages)):
        yield f"Dockerfile: {unknown} is not among the packages of scripts/setup"


def units_are_what_systemd_and_roles_accept():
    """The units as installed, except for the path of the binary, which must exist for the check."""
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
        print("deploy: NOT CHECKED: no systemd-analyze here, so only the names of the units' sections are checked")
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
            # The exit code is 0 in spite of warnings, such as an unknown key; warnings about other units are ignored.
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


def kubernetes_is_as_safe_as_it_can_be():
    """The restricted profile, disruption budgets, and settings that fit each other."""
    resources = manifests()
    budgets = {each["metadata"]["name"]: each["spec"] for each in resources if each["kind"] == "PodDisruptionBudget"}
    for resource in resources:
        if resource["kind"] not in ["Deployment", "StatefulSet"]:
            continue
        pod = resource["spec"]["template"]["spec"]
        for problem in [*profile_is_not_restricted(pod), *pod_is_not_looked_after(pod)]:
            yield f"{what(resource)}: {problem}"
        budget = budgets.get(resource["metadata"]["name"], {})
        stateless = resource["kind"] == "Deployment"
        if budget.get("unhealthyPodEvictionPolicy") != ("AlwaysAllow" if stateless else "IfHealthyBudget"):
            yield f"{what(resource)}: its PodDisruptionBudget does not set when a pod that is not ready may be evicted"
        if pod["containers"][0]["image"] == "dkc":
            yield from (f"{what(resource)}: {problem}" for problem in role_does_not_fit(pod))
    labels = next(each["metadata"]["labels"] for each in resources if each["kind"] == "Namespace")
    if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "Namespace: the restricted profile is not enforced"


def profile_is_not_restricted(pod):
    shared, container = pod["securityContext"], pod["containers"][0]["securityContext"]
    if pod.get("automountServiceAccountToken") is not False:
        yield "it has a service account token"
    if not shared.get("runAsNonRoot") or shared.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "runAsNonRoot and seccompProfile are required"
    if "fsGroup" in shared and shared.get("fsGroupChangePolicy") != "OnRootMismatch":
        yield "every file of its volume gets a new owner at each start"
    wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    if container != wanted:
        yield f"its securityContext is not {wanted}"


def pod_is_not_looked_after(pod):
    container = pod["containers"][0]
    if not {"livenessProbe", "readinessProbe"} <= set(container):
        yield "probes are required"
    if "memory" not in container["resources"]["limits"]:
        yield "no limit of memory"
    apart = pod.get("affinity", {}).get("podAntiAffinity", {})
    rules = apart.get("requiredDuringSchedulingIgnoredDuringExecution", []) + pod.get("topologySpreadConstraints", [])
    if "kubernetes.io/hostname" not in {rule["topologyKey"] for rule in rules}:
        yield "all of them may be put on one machine"


def role_does_not_fit(pod):
    container = pod["containers"][0]
    role = container["args"][0]
    variables = {each["name"]: each.get("value", "") for each in container["env"]}
    if pod.get("nodeSelector") != {"kubernetes.io/arch": "amd64"}:
        yield "it may be put on a machine of another architecture"
    for name in ["DKC_LISTEN", "DKC_HTTP", "DKC_METRICS"]:
        if name in variables and not variables[name].startswith("$(POD_IP):"):
            yield f"{name} is of one family of addresses"
    problem = memory_is_too_small(role, variables, container["resources"]["limits"]["memory"])
    if problem:
        yield problem
    if role == "gateway":
        pause = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if not 0 < pause <= pod["terminationGracePeriodSeconds"] - 20:
            yield "no preStop, or none that fits into its grace period"


# A client that reaches one of these ports is a member of the cluster.
TRUSTED_PORTS = {7001, 7002, 2379, 2380}


def network_policies_let_in_who_belongs_there():
    policies = [each for each in manifests() if each["kind"] == "NetworkPolicy"]
    pods = {
        each["metadata"]["name"]: each["spec"]["template"]
        for each in manifests()
        if each["kind"] in ["Deployment", "StatefulSet"]
    }
    if not any(each["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]} for each in policies):
        yield "no NetworkPolicy denies traffic by default"
    for name, pod in pods.items():
        own = [each["spec"] for each in policies if each["spec"]["podSelector"] == {"matchLabels": pod["metadata"]["labels"]}]
        rules = [rule for spec in own for rule in spec["ingress"]]
        opened = {port["port"]: rule.get("from", []) for rule in rules for port in rule["ports"]}
        there = {port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        if set(opened) != there:
            yield f"NetworkPolicy {name}: opens {sorted(opened)}, the pods have {sorted(there)}"
        for port in TRUSTED_PORTS & set(opened):
            peers = opened[port]
            if not peers or any(set(peer) != {"podSelector"} or not peer["podSelector"] for peer in peers):
                yield f"NetworkPolicy {name}: {port} is open to others than the cluster's own pods"
            for peer in peers:
                expressions = peer["podSelector"].get("matchExpressions", [])
                named = [value for each in expressions for value in each["values"]]
                for unknown in set(named) - set(pods):
                    yield f"NetworkPolicy {name}: no pods are called {unknown}"


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
    """The queries of the dashboard and the rules: (where, expression)."""
    for rule in documents(DEPLOY / "prometheus/rules.yml")[0]["groups"][0]["rules"]:
        yield f"rule {rule['alert']}", rule["expr"]
    for panel in json.loads((DEPLOY / "grafana/board.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield f"board, {panel['title']!r}", target["expr"]


def metrics_exist():
    """Some metrics appear a moment after their event, so the check retries."""
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
                yield f"{where}: no {' or '.join(roles)} exposes {name}"
            elif not any(labels <= known | {"instance"} for known in found):
                yield f"{where}: {name} has no label among {sorted(labels)}"


def labels_of(expression):
    return {label.strip() for listed in re.findall(r"\bby \((.*?)\)", expression) for label in listed.split(",")}


def scrape(cluster_file):
    """The labels of every metric, by role, after some load on each role."""
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
        compose_looks_after_what_it_runs,
        image_names_whose_work_is_in_it,
        dockerfile_builds_what_the_sources_need,
        units_are_what_systemd_and_roles_accept,
        kubernetes_is_what_it_and_roles_accept,
        kubernetes_is_as_safe_as_it_can_be,
        network_policies_let_in_who_belongs_there,
        prometheus_accepts_its_files,
        prometheus_scrapes_what_compose_runs,
        metrics_exist,
    ]
    return 1 if run_cases("deploy", checks) else 0


if __name__ == "__main__":
    sys.exit(main())
