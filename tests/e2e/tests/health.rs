//! A node that dies, and what the others' Services do about it; what each Service says of itself.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use weft_tests_e2e::traffic::Clients;
use weft_tests_e2e::{agent_of, cluster, eventually};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::netns::ip;
use weft_tests_harness::wait_until;

const PATIENCE: Duration = Duration::from_secs(30);
const NODE_PORT: u16 = 30_080;
/// Connections that must all succeed once a dead node is noticed.
const CONNECTIONS: u64 = 300;

/// An nginx on each node, a client on the first, and a Service.
fn workload() -> String {
    let pod = |name: &str, node: &str, app: &str, container: &str| {
        format!(
            "apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {app}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers: [{container}]
---
"
        )
    };
    let mut text: String = (1..=3)
        .map(|i| {
            pod(&format!("web-{i}"), &format!("node-{i}"), "web", "{name: nginx, image: \"nginx:1.22\"}")
        })
        .collect();
    let sleeper = "{name: main, image: busybox, command: [sleep, \"100000\"]}";
    text.push_str(&pod("client", "node-1", "client", sleeper));
    text.push_str(
        "apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, nodePort: 30080}]}
",
    );
    text
}

#[test]
fn a_dead_nodes_endpoints_are_left_out_and_come_back() -> anyhow::Result<()> {
    let test = "health::a_dead_nodes_endpoints_are_left_out_and_come_back";
    let Some(mut cluster) = cluster(test, "dead", &["--nodes", "3"])? else { return Ok(()) };
    cluster.apply(&workload())?;
    cluster.kubectl(&["wait", "pod", "--all", "--for=condition=Ready", "--timeout=60s"])?;
    for node in ["node-1", "node-3"] {
        left_out(&cluster, node, |names| names.is_empty())?;
        heard(&cluster, node)?;
    }
    let first = [to_node(&cluster, "node-1")?, to_node(&cluster, "node-3")?];

    // An agent that dies takes nothing with it.
    let agent = agent_of(&cluster, "node-3")?;
    let clients = Clients::start(&cluster.netns, first[0], 1, Duration::from_millis(2))?;
    answers(&clients, CONNECTIONS)?;
    kill(agent, Signal::SIGKILL)?;
    wait_until("the agent is started again", PATIENCE, || {
        Ok(agent_of(&cluster, "node-3").ok().filter(|pid| *pid != agent))
    })?;
    answers(&clients, clients.answered() + CONNECTIONS)?;
    assert_eq!(clients.stop()?.lost, Vec::<String>::new());
    heard(&cluster, "node-3")?;

    let since = Instant::now();
    link(&cluster, "down")?;
    for node in ["node-1", "node-3"] {
        left_out(&cluster, node, |names| names.iter().any(|name| name.contains("node-2")))?;
        eprintln!("{node} leaves node-2's endpoints out {:?} after its link was cut", since.elapsed());
    }
    // From now on no connection fails: from outside, from a pod, to any node that lives.
    for to in first {
        let clients = Clients::start(&cluster.netns, to, 2, Duration::from_millis(2))?;
        answers(&clients, CONNECTIONS)?;
        let tally = clients.stop()?;
        assert_eq!(tally.lost, Vec::<String>::new());
        assert_eq!(tally.answers.keys().map(String::as_str).collect::<Vec<_>>(), ["web-1", "web-3"]);
    }
    let address = cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
    let asked =
        format!("for i in $(seq 50); do timeout 60 wget -qO- http://{address}/hostname || exit 1; done");
    let said = cluster.kubectl(&["exec", "client", "--", "sh", "-c", &asked])?;
    ensure!(!said.contains("web-2") && said.contains("web-3"), "{said}");

    let why = weft(&cluster, &["why", "client", "web:80"])?;
    ensure!(why.contains("is left out: node node-2 doesn't answer"), "{why}");
    let shown = weft(&cluster, &["service", "show", "web"])?;
    ensure!(shown.contains("is left out: node node-2 doesn't answer"), "{shown}");
    let reasons = [
        "get",
        "events",
        "-A",
        "-o",
        "jsonpath={range .items[?(@.reason==\"NodeUnreachable\")]}{.involvedObject.name} {end}",
    ];
    let events = eventually(&cluster, &reasons, |names| !names.is_empty())?;
    assert!(events.split_whitespace().all(|node| node == "node-2"), "{events}: nobody else was dead");

    link(&cluster, "up")?;
    for node in ["node-1", "node-3"] {
        left_out(&cluster, node, |names| names.is_empty())?;
    }
    eventually(
        &cluster,
        &["get", "pod", "web-2", "-o", "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}"],
        |ready| ready == "True",
    )?;
    let clients = Clients::start(&cluster.netns, first[0], 1, Duration::from_millis(2))?;
    answers(&clients, CONNECTIONS)?;
    let tally = clients.stop()?;
    assert_eq!(tally.lost, Vec::<String>::new());
    assert!(tally.answers.contains_key("web-2"), "{:?}", tally.answers);
    cluster.purge()
}

#[test]
fn each_service_says_on_how_many_nodes_it_is() -> anyhow::Result<()> {
    let test = "health::each_service_says_on_how_many_nodes_it_is";
    let Some(mut cluster) = cluster(test, "says", &["--nodes", "2"])? else { return Ok(()) };
    cluster.kubectl(&["create", "service", "clusterip", "web", "--tcp=80"])?;
    cluster.kubectl(&["create", "service", "clusterip", "headless", "--clusterip=None"])?;
    let wait =
        ["wait", "service/web", "service/kubernetes", "--for=condition=weft.dev/Programmed", "--timeout=60s"];
    cluster.kubectl(&wait)?;
    let message =
        message(&cluster, "web", |text| text.starts_with("programmed on 2 of 2 nodes at resource version "))?;

    // A change of the Service is programmed anew, and said so.
    let other_port = "[{\"op\":\"replace\",\"path\":\"/spec/ports/0/port\",\"value\":81}]";
    cluster.kubectl(&["patch", "service", "web", "--type=json", "-p", other_port])?;
    self::message(&cluster, "web", |text| text.starts_with("programmed on 2 of 2 nodes") && text != message)?;

    // What has its addresses in no kernel says nothing; and what is said is not said again and again.
    let none = cluster.kubectl(&["get", "service", "headless", "-o", "jsonpath={.status.conditions}"])?;
    assert_eq!(none, "");
    let version = ["get", "service", "web", "-o", "jsonpath={.metadata.resourceVersion}"];
    let before = cluster.kubectl(&version)?;
    let agent = agent_of(&cluster, "node-2")?;
    kill(agent, Signal::SIGKILL)?;
    wait_until("the agent is started again", PATIENCE, || {
        Ok(agent_of(&cluster, "node-2").ok().filter(|pid| *pid != agent))
    })?;
    cluster.kubectl(&["create", "service", "clusterip", "other", "--tcp=80"])?;
    cluster.kubectl(&["wait", "service/other", "--for=condition=weft.dev/Programmed", "--timeout=60s"])?;
    assert_eq!(cluster.kubectl(&version)?, before);

    // It becomes headless' like: the condition goes.
    cluster.kubectl(&["label", "service", "web", "service.kubernetes.io/service-proxy-name=other"])?;
    eventually(&cluster, &["get", "service", "web", "-o", "jsonpath={.status.conditions}"], |text| {
        text.is_empty() || text == "[]"
    })?;
    cluster.purge()
}

fn message(cluster: &Cluster, service: &str, accept: impl Fn(&str) -> bool) -> anyhow::Result<String> {
    let path = "jsonpath={.status.conditions[?(@.type==\"weft.dev/Programmed\")].message}";
    eventually(cluster, &["get", "service", service, "-o", path], accept)
}

fn link(cluster: &Cluster, state: &str) -> anyhow::Result<()> {
    ip(&["-n", cluster.netns.name(), "link", "set", "weftu-2", state])
}

fn weft(cluster: &Cluster, args: &[&str]) -> anyhow::Result<String> {
    let output = cluster.weft()?.args(args).stdin(Stdio::null()).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits until a node says what is wanted of what it leaves out.
fn left_out(cluster: &Cluster, node: &str, accept: impl Fn(&[String]) -> bool) -> anyhow::Result<()> {
    let mut last = String::new();
    let waited = wait_until("the node leaves out what is wanted", PATIENCE, || {
        last = weft(cluster, &["service", "show", "web", "-o", "json"])?;
        let shown: Value = serde_json::from_str(&last)?;
        let left_out = shown["nodes"][node]["leftOut"].as_array().context("what is left out")?;
        let reasons: Vec<String> = left_out.iter().map(|one| one["reason"].to_string()).collect();
        Ok(accept(&reasons).then_some(()))
    });
    waited.with_context(|| format!("{node}: {last}"))
}

/// Waits until a node has heard of both others: nobody is believed dead who has never answered.
fn heard(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let folder = weft_namespace(cluster, node)?;
    wait_until("a node has heard the others", PATIENCE, || {
        let mut command = weft_tests_harness::netns::command_in(&folder, "curl")?;
        let output = command.args(["-s", "-m", "5", "http://127.0.0.1:10249/metrics"]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(text.contains("weft_dataplane_nodes{state=\"answering\"} 2").then_some(()))
    })
}

/// The file of a node's network namespace, by its agent.
fn weft_namespace(cluster: &Cluster, node: &str) -> anyhow::Result<std::path::PathBuf> {
    Ok(format!("/proc/{}/ns/net", agent_of(cluster, node)?).into())
}

fn to_node(cluster: &Cluster, node: &str) -> anyhow::Result<SocketAddr> {
    let path = "jsonpath={.status.addresses[?(@.type==\"InternalIP\")].address}";
    let address: Ipv4Addr = cluster.kubectl(&["get", "node", node, "-o", path])?.parse()?;
    Ok(SocketAddr::from((address, NODE_PORT)))
}

fn answers(clients: &Clients, wanted: u64) -> anyhow::Result<()> {
    let waited =
        wait_until("the Service answers", PATIENCE, || Ok((clients.answered() >= wanted).then_some(())));
    waited
        .with_context(|| format!("{} of {wanted} answers; lost: {:?}", clients.answered(), clients.losses()))
}
