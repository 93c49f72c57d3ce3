//! A canary: pods whose annotation gives them a smaller or a larger share of a Service's connections.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use weft_tests_e2e::traffic::Clients;
use weft_tests_e2e::{cluster, eventually};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::wait_until;

const PATIENCE: Duration = Duration::from_secs(60);
const NODE_PORT: u16 = 30_082;
const CONNECTIONS: u64 = 1_000;

/// A server with nine tenths of the connections and one with the rest; a client; a Service of both.
fn workload() -> String {
    let pod = |name: &str, more: &str, command: &str| {
        format!(
            "apiVersion: v1
kind: Pod
metadata: {{name: {name}, {more}}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{{name: main, image: busybox, command: [sh, -c, \"{command}\"]}}]
---
"
        )
    };
    let serve = "mkdir -p /www && hostname > /www/hostname && exec httpd -f -p 80 -h /www";
    let stable = "labels: {app: web}, annotations: {weft.dev/weight: \"9\"}";
    let text = pod("stable", stable, serve)
        + &pod("canary", "labels: {app: web}", serve)
        + &pod("client", "labels: {app: client}", "exec sleep 100000");
    text + "apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, nodePort: 30082}]}
"
}

#[test]
fn pods_get_connections_by_their_weights() -> anyhow::Result<()> {
    let Some(mut cluster) = cluster("weights::pods_get_connections_by_their_weights", "weights", &[])? else {
        return Ok(());
    };
    cluster.apply(&workload())?;
    cluster.kubectl(&["wait", "pod", "--all", "--for=condition=Ready", "--timeout=60s"])?;
    weights(&cluster, |of| of == BTreeMap::from([("canary", ""), ("stable", "9")]))?;
    // One tenth: by sockets at random, from outside by a table. Further off than this it is once in a million runs.
    for (who, canary) in [("inside", inside(&cluster)?), ("outside", outside(&cluster)?)] {
        ensure!((50..=160).contains(&canary), "{who}: the canary got {canary} of {CONNECTIONS}");
    }
    // It proves itself, and gets half.
    cluster.kubectl(&["annotate", "pod", "canary", "weft.dev/weight=9"])?;
    weights(&cluster, |of| of == BTreeMap::from([("canary", "9"), ("stable", "9")]))?;
    for (who, canary) in [("inside", inside(&cluster)?), ("outside", outside(&cluster)?)] {
        ensure!((400..=600).contains(&canary), "{who}: the canary got {canary} of {CONNECTIONS}");
    }
    cluster.purge()
}

/// Waits for the weights of the slices, by their ready endpoints, and until the node has them.
fn weights(cluster: &Cluster, accept: impl Fn(BTreeMap<&str, &str>) -> bool) -> anyhow::Result<()> {
    let path = "jsonpath={range .items[*]}{range .endpoints[?(@.conditions.ready==true)]}{.targetRef.name} {end}\
        =\"{.metadata.annotations.weft\\.dev/weight}\" {end}";
    eventually(
        cluster,
        &["get", "endpointslices", "-l", "kubernetes.io/service-name=web", "-o", path],
        |said| {
            let mut of = BTreeMap::new();
            let mut names = Vec::new();
            for word in said.split_whitespace() {
                match word.strip_prefix('=') {
                    Some(weight) => of.extend(names.drain(..).map(|name| (name, weight.trim_matches('"')))),
                    None => names.push(word),
                }
            }
            accept(of)
        },
    )?;
    wait_until("the node has it", PATIENCE, || {
        let output = cluster.weft()?.args(["service", "show", "web"]).output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(said.contains("Programmed:               on 1 of 1 nodes").then_some(()))
    })
}

/// How many of a pod's connections the canary gets.
fn inside(cluster: &Cluster) -> anyhow::Result<u64> {
    let address = cluster.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
    let ask =
        format!("for i in $(seq {CONNECTIONS}); do wget -qO- http://{address}/hostname || exit 1; done");
    let said = cluster.kubectl(&["exec", "client", "--", "sh", "-c", &ask])?;
    Ok(said.lines().filter(|line| *line == "canary").count() as u64)
}

/// How many of so many from outside.
fn outside(cluster: &Cluster) -> anyhow::Result<u64> {
    let path = "jsonpath={.items[0].status.addresses[?(@.type==\"InternalIP\")].address}";
    let node: Ipv4Addr = cluster.kubectl(&["get", "node", "-o", path])?.parse()?;
    let to = SocketAddr::from((node, NODE_PORT));
    let clients = Clients::start(&cluster.netns, to, 2, Duration::from_millis(1))?;
    wait_until("the Service answers", PATIENCE, || Ok((clients.answered() >= CONNECTIONS).then_some(())))
        .with_context(|| format!("lost: {:?}", clients.losses()))?;
    let tally = clients.stop()?;
    ensure!(tally.lost.is_empty(), "{:?}", tally.lost);
    let canary = tally.answers.get("canary").copied().unwrap_or(0);
    Ok(canary * CONNECTIONS / tally.answered())
}
