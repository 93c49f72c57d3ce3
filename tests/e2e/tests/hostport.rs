//! Host ports: a pod answers on its node's addresses, to whoever asks, for as long as it is there.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use weft_tests_e2e::{cluster, sleeper};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::wait_until;

const FLAGS: [&str; 6] =
    ["--nodes", "2", "--cluster-cidr", "10.42.0.0/16,fd42::/56", "--service-cidr", "10.43.0.0/16,fd43::/112"];

/// The second node's addresses.
const NODE: [&str; 2] = ["10.44.0.3", "[fd44::3]"];

const WEB: &str = "apiVersion: v1
kind: Pod
metadata:
  name: web
spec:
  nodeName: node-2
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: busybox
    command: [sh, -c, 'mkdir /www && hostname > /www/hostname && exec httpd -f -p \"[::]:80\" -h /www']
    ports: [{containerPort: 80, hostPort: 8080}]
    readinessProbe: {httpGet: {path: /hostname, port: 80}, periodSeconds: 1}
---
";

#[test]
fn a_host_port_answers_on_its_nodes_addresses() -> anyhow::Result<()> {
    let Some(mut cluster) = cluster("hostport::answers", "hostport", &FLAGS)? else { return Ok(()) };
    let clients = [sleeper("client-1", Some("node-1")), sleeper("client-2", Some("node-2"))];
    cluster.apply(&format!("{WEB}{}", clients.join("---\n")))?;
    cluster.kubectl(&[
        "wait",
        "--for=condition=Ready",
        "--timeout=60s",
        "pod/web",
        "pod/client-1",
        "pod/client-2",
    ])?;
    for address in NODE {
        assert!(opens(&cluster, address)?, "the machine that the nodes are on does not reach {address}");
        // From another node, from the same, and from itself.
        for pod in ["client-1", "client-2", "web"] {
            let url = format!("http://{address}:8080/hostname");
            let said = cluster.kubectl(&["exec", pod, "--", "wget", "-qO-", &url])?;
            assert_eq!(said.trim(), "web", "{pod} to {url}");
        }
    }
    cluster.kubectl(&["delete", "pod", "web"])?;
    wait_until("the port to be free", Duration::from_secs(30), || {
        Ok((!opens(&cluster, NODE[0])? && !opens(&cluster, NODE[1])?).then_some(()))
    })?;
    cluster.purge()
}

/// Whether somebody answers at the node's port.
fn opens(cluster: &Cluster, address: &str) -> anyhow::Result<bool> {
    let target: SocketAddr = format!("{address}:8080").parse()?;
    let patience = Duration::from_secs(2);
    let attempt = cluster.netns.thread(move || Ok(TcpStream::connect_timeout(&target, patience).is_ok()))?;
    attempt.join().map_err(|panic| anyhow::anyhow!("the client broke down: {panic:?}"))?
}
