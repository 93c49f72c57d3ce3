//! NetworkPolicy in a real cluster: pods a, b and c in namespaces x, y and z, on two nodes, in both families. After each
//! change of policies every pod probes every other on every port, and the whole truth table must be as expected.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use weft_tests_e2e::{cluster, eventually, image_archive};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::wait_until;

const FLAGS: [&str; 6] =
    ["--nodes", "2", "--cluster-cidr", "10.42.0.0/16,fd42::/56", "--service-cidr", "10.43.0.0/16,fd43::/112"];
const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const PODS: [&str; 3] = ["a", "b", "c"];
const PORTS: [(&str, u16); 4] = [("tcp", 80), ("tcp", 81), ("udp", 80), ("udp", 81)];
/// Longer than an answer takes on a busy machine; a round with a dropped answer is repeated.
const PATIENCE_MS: u32 = 1_500;

/// A probe.
#[derive(Clone, Copy)]
struct Probe<'a> {
    /// Namespace and name, as `x/a`.
    from: &'a str,
    to: &'a str,
    protocol: &'a str,
    port: u16,
}

impl Probe<'_> {
    fn from(&self, namespace: &str) -> bool {
        self.from.starts_with(namespace)
    }

    fn to(&self, namespace: &str) -> bool {
        self.to.starts_with(namespace)
    }

    fn is(&self, protocol: &str, port: u16) -> bool {
        (self.protocol, self.port) == (protocol, port)
    }
}

/// The cluster, and the pods' addresses.
struct Table {
    cluster: Cluster,
    addresses: BTreeMap<String, Vec<String>>,
}

#[test]
fn the_truth_table() -> anyhow::Result<()> {
    let Some(cluster) = cluster("policy::the_truth_table", "policy", &FLAGS)? else { return Ok(()) };
    let mut table = Table { cluster, addresses: BTreeMap::new() };
    table.populate()?;
    table.expect("no policy", |_| true)?;
    ingress(&table)?;
    labels(&table)?;
    ports(&table)?;
    egress(&table)?;
    blocks(&table)?;
    first_packets(&table)?;
    table.cluster.purge()
}

impl Table {
    fn populate(&mut self) -> anyhow::Result<()> {
        self.cluster.import(&image_archive("probe")?)?;
        let mut manifests = Vec::new();
        for namespace in NAMESPACES {
            manifests.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": {"ns": namespace}}}));
            for pod in PODS {
                manifests.push(server(namespace, pod));
            }
        }
        self.apply(&manifests)?;
        for namespace in NAMESPACES {
            let ready = ["wait", "pod", "--all", "-n", namespace, "--for=condition=Ready", "--timeout=60s"];
            self.cluster.kubectl(&ready)?;
        }
        for namespace in NAMESPACES {
            let columns = "jsonpath={range .items[*]}{.metadata.name} {.status.podIPs[*].ip}{\"\\n\"}{end}";
            for line in self.cluster.kubectl(&["get", "pods", "-n", namespace, "-o", columns])?.lines() {
                let mut words = line.split(' ').map(str::to_owned);
                let name = words.next().context("every pod has a name")?;
                let addresses: Vec<String> = words.collect();
                ensure!(addresses.len() == 2, "{namespace}/{name} has {addresses:?}");
                self.addresses.insert(format!("{namespace}/{name}"), addresses);
            }
        }
        Ok(())
    }

    fn apply(&self, objects: &[Value]) -> anyhow::Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.cluster.apply(&list.to_string()).map(drop)
    }

    fn policy(&self, namespace: &str, name: &str, spec: &Value) -> anyhow::Result<()> {
        self.apply(&[json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "spec": spec,
            "metadata": {"namespace": namespace, "name": name}})])
    }

    fn delete(&self, namespace: &str, name: &str) -> anyhow::Result<()> {
        self.cluster.kubectl(&["delete", "networkpolicy", "-n", namespace, name]).map(drop)
    }

    /// Waits until the whole table is as expected.
    fn expect(&self, what: &str, expected: impl Fn(Probe<'_>) -> bool) -> anyhow::Result<()> {
        let mut wrong = String::new();
        let waited = wait_until(what, Duration::from_secs(60), || {
            wrong = self.wrong(&expected)?;
            Ok(wrong.is_empty().then_some(()))
        });
        waited.with_context(|| format!("not as expected:\n{wrong}"))
    }

    /// Probes every pair; answers the rows that are not as expected.
    fn wrong(&self, expected: &impl Fn(Probe<'_>) -> bool) -> anyhow::Result<String> {
        let mut requests = Vec::new();
        for (to, addresses) in &self.addresses {
            for (protocol, port) in PORTS {
                requests
                    .extend(addresses.iter().map(|address| (to.as_str(), address.as_str(), protocol, port)));
            }
        }
        let answers: Vec<anyhow::Result<(String, String)>> = std::thread::scope(|scope| {
            let asking: Vec<_> =
                self.addresses.keys().map(|from| scope.spawn(|| self.ask(from, &requests))).collect();
            let said = asking.into_iter().map(|thread| match thread.join() {
                Ok(answers) => answers,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            said.zip(self.addresses.keys()).map(|(said, from)| Ok((from.clone(), said?))).collect()
        });
        let mut wrong = String::new();
        for answer in answers {
            let (from, said) = answer?;
            let outcomes: BTreeMap<usize, &str> = said
                .lines()
                .filter_map(|line| line.split_once(' '))
                .filter_map(|(id, rest)| Some((id.parse().ok()?, rest)))
                .collect();
            for (id, (to, address, protocol, port)) in requests.iter().enumerate() {
                let outcome = outcomes.get(&id).copied().unwrap_or("no outcome");
                let probe = Probe { from: &from, to, protocol, port: *port };
                // A pod can't keep itself out.
                if outcome.starts_with("ok ") != (from == *to || expected(probe)) {
                    writeln!(wrong, "{from} to {to} ({address}) {protocol} {port}: {outcome}")?;
                }
            }
        }
        Ok(wrong)
    }

    fn ask(&self, from: &str, requests: &[(&str, &str, &str, u16)]) -> anyhow::Result<String> {
        let (namespace, pod) = from.split_once('/').context("a namespace and a name")?;
        let exec = ["exec", "-i", "-n", namespace, pod, "--", "weft-probe", "ask"];
        let mut command = self.cluster.kubectl_command(&exec)?;
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut input = String::new();
        for (id, (_, address, protocol, port)) in requests.iter().enumerate() {
            let address = if address.contains(':') { format!("[{address}]") } else { (*address).to_owned() };
            writeln!(input, "{id} {protocol} {address}:{port} 1 {PATIENCE_MS}")?;
        }
        child.stdin.take().context("standard input is a pipe")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "weft-probe in {from}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// A pod that serves every port, and is ready only if its node reaches it.
fn server(namespace: &str, pod: &str) -> Value {
    let node = if (pod == "b") == (namespace == "y") { "node-1" } else { "node-2" };
    let ports: Vec<Value> = PORTS
        .iter()
        .map(|(protocol, port)| json!({"name": format!("serve-{port}-{protocol}"), "containerPort": port, "protocol": protocol.to_uppercase()}))
        .collect();
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": namespace, "name": pod, "labels": {"pod": pod}},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [{"name": "main", "image": "weft-probe:1",
            "command": ["weft-probe", "serve", "80/tcp", "81/tcp", "80/udp", "81/udp"], "ports": ports,
            "readinessProbe": {"tcpSocket": {"port": 80}, "periodSeconds": 1}}]}})
}

fn labelled(key: &str, value: &str) -> Value {
    json!({"matchLabels": {key: value}})
}

fn ingress(table: &Table) -> anyhow::Result<()> {
    table.policy("x", "deny", &json!({"podSelector": {}, "policyTypes": ["Ingress"]}))?;
    table.expect("default deny into a namespace", |p| !p.to("x"))?;
    let from_b = json!([{"podSelector": labelled("pod", "b")}]);
    table.policy(
        "x",
        "allow",
        &json!({"podSelector": labelled("pod", "a"), "ingress": [{"from": from_b}]}),
    )?;
    table
        .expect("pods of the own namespace by label", |p| !p.to("x") || (p.from == "x/b" && p.to == "x/a"))?;
    let from_y = json!([{"namespaceSelector": labelled("ns", "y")}]);
    table.policy("x", "allow", &json!({"podSelector": {}, "ingress": [{"from": from_y}]}))?;
    table.expect("a namespace by label", |p| !p.to("x") || p.from("y"))?;
    let not_x = json!({"matchExpressions": [{"key": "ns", "operator": "NotIn", "values": ["x"]}]});
    let both = json!([{"namespaceSelector": not_x, "podSelector": labelled("pod", "b")}]);
    table.policy("x", "allow", &json!({"podSelector": {}, "ingress": [{"from": both}]}))?;
    table.expect("namespace and pod", |p| !p.to("x") || p.from == "y/b" || p.from == "z/b")?;
    let either = json!([{"namespaceSelector": labelled("ns", "y")}, {"podSelector": labelled("pod", "b")}]);
    table.policy("x", "allow", &json!({"podSelector": {}, "ingress": [{"from": either}]}))?;
    table.expect("namespace or pod", |p| !p.to("x") || p.from("y") || p.from == "x/b")?;
    table.policy("x", "all", &json!({"podSelector": {}, "ingress": [{}]}))?;
    table.expect("everybody", |_| true)?;
    table.delete("x", "all")?;
    table.delete("x", "allow")
}

/// Labels of pods and namespaces change under a policy. `deny` of x holds.
fn labels(table: &Table) -> anyhow::Result<()> {
    let team =
        json!([{"namespaceSelector": labelled("team", "red")}, {"podSelector": labelled("team", "red")}]);
    table.policy("x", "team", &json!({"podSelector": {}, "ingress": [{"from": team}]}))?;
    table.expect("nobody is on the team", |p| !p.to("x"))?;
    table.cluster.kubectl(&["label", "namespace", "z", "team=red"])?;
    table.cluster.kubectl(&["label", "pod", "-n", "x", "c", "team=red"])?;
    table.expect("both joined", |p| !p.to("x") || p.from("z") || p.from == "x/c")?;
    table.cluster.kubectl(&["label", "namespace", "z", "team-"])?;
    table.cluster.kubectl(&["label", "pod", "-n", "x", "c", "team=blue", "--overwrite"])?;
    table.expect("both left", |p| !p.to("x"))?;
    table.delete("x", "team")?;
    table.delete("x", "deny")?;
    table.expect("no policy any more", |_| true)
}

fn ports(table: &Table) -> anyhow::Result<()> {
    let only = |ports: Value| json!({"podSelector": labelled("pod", "a"), "ingress": [{"ports": ports}]});
    table.policy("x", "ports", &only(json!([{"port": 81}])))?;
    table.expect("a port", |p| p.to != "x/a" || p.is("tcp", 81))?;
    table.policy(
        "x",
        "ports",
        &only(json!([{"port": 79, "endPort": 80, "protocol": "UDP"}, {"port": 80}])),
    )?;
    table.expect("a range of ports", |p| p.to != "x/a" || p.port == 80)?;
    table.policy("x", "ports", &only(json!([{"port": "serve-81-udp", "protocol": "UDP"}])))?;
    table.expect("a named port", |p| p.to != "x/a" || p.is("udp", 81))?;
    let from_y = json!([{"namespaceSelector": labelled("ns", "y")}]);
    let stacked =
        json!({"podSelector": labelled("pod", "a"), "ingress": [{"from": from_y, "ports": [{"port": 80}]}]});
    table.policy("x", "stacked", &stacked)?;
    table.expect("policies add up", |p| {
        p.to != "x/a" || p.is("udp", 81) || (p.from("y") && p.is("tcp", 80))
    })?;
    table.delete("x", "stacked")?;
    table.delete("x", "ports")
}

fn egress(table: &Table) -> anyhow::Result<()> {
    table.policy("x", "out", &json!({"podSelector": labelled("pod", "a"), "policyTypes": ["Egress"]}))?;
    table.expect("no way out", |p| p.from != "x/a")?;
    let b_of_y = json!([{"namespaceSelector": labelled("ns", "y"), "podSelector": labelled("pod", "b")}]);
    let rule = json!([{"to": b_of_y, "ports": [{"port": "serve-80-tcp"}, {"port": 81, "protocol": "UDP"}]}]);
    table.policy(
        "x",
        "out",
        &json!({"podSelector": labelled("pod", "a"), "policyTypes": ["Egress"], "egress": rule}),
    )?;
    let out = |p: Probe<'_>| p.from != "x/a" || (p.to == "y/b" && (p.is("tcp", 80) || p.is("udp", 81)));
    table.expect("to one pod", out)?;
    let from_a = json!([{"namespaceSelector": labelled("ns", "x"), "podSelector": labelled("pod", "a")}]);
    let into = json!({"podSelector": {}, "ingress": [{"from": from_a, "ports": [{"port": 80}]}]});
    table.policy("y", "in", &into)?;
    table.expect("both ends must allow it", |p| {
        out(p) && (!p.to("y") || (p.from == "x/a" && p.is("tcp", 80)))
    })?;
    table.delete("y", "in")?;
    table.delete("x", "out")
}

fn blocks(table: &Table) -> anyhow::Result<()> {
    let of = |pod: &str| table.addresses.get(pod).cloned().context("it has addresses");
    let (a, b) = (of("y/a")?, of("y/b")?);
    let block = |cidr: &str, except: &[String]| json!({"ipBlock": {"cidr": cidr, "except": except}});
    let from = json!([
        block("10.42.0.0/16", &[format!("{}/32", a[0])]),
        block("fd42::/56", &[format!("{}/128", a[1])])
    ]);
    let into = |from: &Value| json!({"podSelector": labelled("pod", "a"), "ingress": [{"from": from}]});
    table.policy("x", "block", &into(&from))?;
    table.expect("all but one address", |p| p.to != "x/a" || p.from != "y/a")?;
    let again =
        json!([from[0], from[1], block(&format!("{}/32", a[0]), &[]), block(&format!("{}/128", a[1]), &[])]);
    table.policy("x", "block", &into(&again))?;
    table.expect("an exception that another block takes back", |_| true)?;
    table.delete("x", "block")?;
    let to = json!([block(&format!("{}/32", b[0]), &[]), block(&format!("{}/128", b[1]), &[])]);
    let out = json!({"podSelector": labelled("pod", "a"), "policyTypes": ["Egress"], "egress": [{"to": to}]});
    table.policy("z", "block", &out)?;
    table.expect("out to one address", |p| p.from != "z/a" || p.to == "y/b")?;
    table.delete("z", "block")?;
    table.expect("no policy at the end", |_| true)
}

/// Pods whose first act is a packet that their policy forbids, and one that it allows.
fn first_packets(table: &Table) -> anyhow::Result<()> {
    let to_b = json!([{"to": [{"podSelector": labelled("pod", "b")}]}]);
    table.policy(
        "x",
        "early",
        &json!({"podSelector": labelled("app", "early"), "policyTypes": ["Egress"], "egress": to_b}),
    )?;
    let of = |pod: &str| table.addresses.get(pod).map(|all| all[0].clone()).context("it has addresses");
    let script = format!(
        "printf '0 tcp {}:80 1 1000\\n1 tcp {}:80 1 5000\\n' | weft-probe ask",
        of("x/a")?,
        of("x/b")?
    );
    let pods: Vec<Value> = (0..8)
        .map(|n| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "x", "name": format!("early-{n}"), "labels": {"app": "early"}},
            "spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "weft-probe:1", "command": ["sh", "-c", script]}]}}))
        .collect();
    table.apply(&pods)?;
    for n in 0..8 {
        let name = format!("early-{n}");
        let phase = ["get", "pod", "-n", "x", &name, "-o", "jsonpath={.status.phase}"];
        eventually(&table.cluster, &phase, |phase| phase == "Succeeded")?;
        let log = table.cluster.kubectl(&["logs", "-n", "x", &name])?;
        let mut lines: Vec<&str> = log.lines().collect();
        lines.sort_unstable();
        ensure!(
            lines.len() == 2 && lines[0].starts_with("0 timeout") && lines[1].starts_with("1 ok"),
            "{name}: {log}"
        );
    }
    Ok(())
}
