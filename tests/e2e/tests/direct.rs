//! `--direct-return on`: a client outside keeps its address towards a pod of another node than the one that it asks.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use weft_tests_e2e::{agent_of, cluster, eventually};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::wait_until;

const FLAGS: [&str; 8] = [
    "--nodes",
    "3",
    "--direct-return",
    "on",
    "--cluster-cidr",
    "10.42.0.0/16,fd42::/56",
    "--service-cidr",
    "10.43.0.0/16,fd43::/112",
];
const NODE_PORT: u16 = 30_085;
const PATIENCE: Duration = Duration::from_secs(30);
/// How long an answer may take.
const SOON: Duration = Duration::from_secs(3);
/// The machine that the nodes are on, which is none of them.
const CLIENT: [&str; 2] = ["10.44.0.1", "fd44::1"];

/// A pod on the second node that says who asks.
const WORKLOAD: &str = "apiVersion: v1
kind: Pod
metadata: {name: who, labels: {app: who}}
spec:
  nodeName: node-2
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: busybox
    command:
    - sh
    - -c
    - |
      mkdir -p /www/cgi-bin
      printf '#!/bin/sh\\necho\\necho \"$REMOTE_ADDR\"\\n' > /www/cgi-bin/who
      chmod +x /www/cgi-bin/who
      exec httpd -f -p 80 -h /www
---
apiVersion: v1
kind: Service
metadata: {name: who}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {app: who}
  ports: [{port: 80, nodePort: 30085}]
";

fn policy(range: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: who}}
spec:
  podSelector: {{matchLabels: {{app: who}}}}
  policyTypes: [Ingress]
  ingress: [{{from: [{{ipBlock: {{cidr: {range}}}}}]}}]
"
    )
}

/// The port of a node, by its address of each family.
fn node(number: u8) -> [SocketAddr; 2] {
    let last = number + 1;
    let addresses = [IpAddr::from([10, 44, 0, last]), IpAddr::from([0xfd44, 0, 0, 0, 0, 0, 0, last.into()])];
    addresses.map(|address| SocketAddr::new(address, NODE_PORT))
}

/// Whom the pod sees.
fn who(cluster: &Cluster, to: SocketAddr) -> anyhow::Result<String> {
    let ask = move || -> anyhow::Result<String> {
        let mut stream = TcpStream::connect_timeout(&to, SOON)?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"GET /cgi-bin/who HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let seen = answer.lines().last().context("an answer has lines")?;
        Ok(seen.trim_matches(['[', ']']).trim_start_matches("::ffff:").to_owned())
    };
    match cluster.netns.thread(ask)?.join() {
        Ok(seen) => seen,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

#[test]
fn a_client_is_seen_by_its_own_address() -> anyhow::Result<()> {
    let test = "direct::a_client_is_seen_by_its_own_address";
    let Some(mut cluster) = cluster(test, "direct", &FLAGS)? else { return Ok(()) };
    cluster.apply(WORKLOAD)?;
    cluster.kubectl(&["wait", "pod/who", "--for=condition=Ready", "--timeout=60s"])?;
    let annotations =
        ["get", "nodes", "-o", "jsonpath={.items[*].metadata.annotations.weft\\.dev/direct-return}"];
    eventually(&cluster, &annotations, |said| said == "1 1 1")?;
    for (at, client) in CLIENT.into_iter().enumerate() {
        for number in [1, 3] {
            let to = node(number)[at];
            wait_until(&format!("{to} leaves the client its address"), PATIENCE, || {
                Ok((who(&cluster, to)? == client).then_some(()))
            })?;
            for _ in 0..20 {
                ensure!(who(&cluster, to)? == client, "{to}");
            }
        }
    }
    explained(&cluster)?;
    policies(&cluster)?;
    restarted(&cluster)?;
    cluster.purge()
}

/// A node that had the flag and has it no longer takes it back.
#[test]
fn a_node_without_the_flag_says_nothing() -> anyhow::Result<()> {
    let test = "direct::a_node_without_the_flag_says_nothing";
    let Some(mut cluster) = cluster(test, "direct-off", &["--nodes", "2"])? else { return Ok(()) };
    cluster.kubectl(&["annotate", "node", "node-1", "weft.dev/direct-return=1"])?;
    kill(agent_of(&cluster, "node-1")?, Signal::SIGKILL)?;
    let annotation =
        ["get", "node", "node-1", "-o", "jsonpath={.metadata.annotations.weft\\.dev/direct-return}"];
    eventually(&cluster, &annotation, str::is_empty)?;
    cluster.purge()
}

/// The way is explained as it is.
fn explained(cluster: &Cluster) -> anyhow::Result<()> {
    let why = |to: &str| -> anyhow::Result<String> {
        let output = cluster.weft()?.args(["why", "10.44.0.1", to]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        Ok(text)
    };
    let handed_on = why("10.44.0.2:30085")?;
    for part in ["the client keeps its address", "and node-2 answers it", "the answer to 10.44.0.1"] {
        ensure!(handed_on.contains(part), "no {part:?} in\n{handed_on}");
    }
    let own = why("10.44.0.3:30085")?;
    ensure!(!own.contains("keeps its address"), "the backend is the node's own:\n{own}");
    Ok(())
}

/// Policies of the pod are asked about the client.
fn policies(cluster: &Cluster) -> anyhow::Result<()> {
    let [to, _] = node(1);
    cluster.apply(&policy("192.0.2.0/24"))?;
    wait_until("the client is kept out", PATIENCE, || Ok(who(cluster, to).is_err().then_some(())))?;
    cluster.apply(&policy("10.44.0.1/32"))?;
    wait_until("the client is let in", PATIENCE, || {
        Ok(who(cluster, to).is_ok_and(|seen| seen == CLIENT[0]).then_some(()))
    })?;
    cluster.kubectl(&["delete", "networkpolicy", "who"]).map(drop)
}

/// The kernel goes on while agents are away.
fn restarted(cluster: &Cluster) -> anyhow::Result<()> {
    for name in ["node-1", "node-2"] {
        kill(agent_of(cluster, name)?, Signal::SIGKILL)?;
        for to in node(1).into_iter().zip(CLIENT) {
            ensure!(who(cluster, to.0)? == to.1, "{} while the agent of {name} is away", to.0);
        }
    }
    Ok(())
}
