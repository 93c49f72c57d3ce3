//! Services of type LoadBalancer: an address from the pool, answered on the nodes' link, by another node when the first dies.

use std::net::{AddrParseError, IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context as _;
use weft_tests_e2e::traffic::Clients;
use weft_tests_e2e::{cluster, eventually, image_archive, nginx};
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::netns::ip;
use weft_tests_harness::wait_until;

const SERVICES: &str = "apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: LoadBalancer
  selector: {app: web}
  ports: [{port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: local}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  selector: {app: one}
  ports: [{port: 80}]
";
/// It listens on both families.
const SERVER: &str = "apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: main, image: \"weft-probe:1\", command: [weft-probe, serve, 80/tcp]}]
";
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn an_address_of_the_pool_answers_and_outlives_its_node() -> anyhow::Result<()> {
    let flags = ["--nodes", "3", "--load-balancer-pool", "10.44.0.200/29"];
    let Some(mut cluster) = cluster("load_balancer", "lb", &flags)? else { return Ok(()) };
    cluster.apply(&nginx("web", 3))?;
    cluster.apply(&nginx("one", 1))?;
    cluster.apply(SERVICES)?;
    for name in ["web", "one"] {
        cluster.kubectl(&["rollout", "status", &format!("deployment/{name}"), "--timeout=60s"])?;
    }
    let (web, local): (Ipv4Addr, Ipv4Addr) = (address(&cluster, "web")?, address(&cluster, "local")?);
    assert_ne!(web, local);

    // Local: the node that answers is the one with the pod.
    let node =
        cluster.kubectl(&["get", "pods", "-l", "app=one", "-o", "jsonpath={.items[0].spec.nodeName}"])?;
    answers(&cluster, local)?;
    assert_eq!(holder(&cluster, local)?, node_address(&cluster, &node)?);

    answers(&cluster, web)?;
    let first = holder(&cluster, web)?;
    let dead = device_of(&cluster, first)?;
    ip(&["-n", cluster.netns.name(), "link", "set", &dead, "down"])?;
    answers(&cluster, web)?;
    let second = holder(&cluster, web)?;
    assert_ne!(first, second);
    ip(&["-n", cluster.netns.name(), "link", "set", &dead, "up"])?;

    cluster.kubectl(&["delete", "service", "web"])?;
    wait_until("nobody has the address any more", PATIENCE, || {
        forget(&cluster, web)?;
        Ok(connects(&cluster, web).is_err().then_some(()))
    })?;
    cluster.purge()
}

/// Of neighbour discovery only that it leads there: how an address moves is the same for both families, and tested without a cluster.
#[test]
fn an_address_of_ipv6_answers() -> anyhow::Result<()> {
    let ranges = ["--cluster-cidr", "fd42::/56", "--service-cidr", "fd43::/112"];
    let flags = [&["--nodes", "2", "--load-balancer-pool", "fd44::c8/125"], &ranges[..]].concat();
    let Some(mut cluster) = cluster("load_balancer::ipv6", "lb6", &flags)? else { return Ok(()) };
    cluster.import(&image_archive("probe")?)?;
    cluster.apply(SERVER)?;
    cluster.apply(SERVICES)?;
    cluster.kubectl(&["wait", "pod/web", "--for=condition=Ready", "--timeout=60s"])?;
    let web: Ipv6Addr = address(&cluster, "web")?;
    answers(&cluster, web)?;
    cluster.purge()
}

fn address<A: FromStr<Err = AddrParseError>>(cluster: &Cluster, service: &str) -> anyhow::Result<A> {
    let path = "jsonpath={.status.loadBalancer.ingress[0].ip}";
    let text = eventually(cluster, &["get", "service", service, "-o", path], |text| !text.is_empty())?;
    text.parse().with_context(|| format!("{text} is no address"))
}

/// Waits until a request is answered, by whichever node.
fn answers(cluster: &Cluster, address: impl Into<IpAddr>) -> anyhow::Result<()> {
    // Several: one that is sent to a pod of the dead node waits for an answer that never comes.
    let address = address.into();
    let clients =
        Clients::start(&cluster.netns, SocketAddr::from((address, 80)), 6, Duration::from_millis(20))?;
    wait_until("the address answers", PATIENCE, || Ok((clients.answered() > 5).then_some(())))
        .with_context(|| format!("{address}: {:?}", clients.losses()))?;
    clients.stop()?;
    Ok(())
}

fn connects(cluster: &Cluster, address: Ipv4Addr) -> anyhow::Result<()> {
    let attempt = cluster.netns.thread(move || {
        std::net::TcpStream::connect_timeout(&SocketAddr::from((address, 80)), Duration::from_millis(500))?;
        Ok(())
    })?;
    attempt.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))?
}

/// The machine's own belief of who has an address would outlive the holder.
fn forget(cluster: &Cluster, address: Ipv4Addr) -> anyhow::Result<()> {
    ip(&["-n", cluster.netns.name(), "neigh", "flush", "to", &address.to_string()])
}

fn shown(cluster: &Cluster, args: &[&str]) -> anyhow::Result<String> {
    let output = cluster.netns.command("ip")?.args(args).output()?;
    Ok(String::from_utf8(output.stdout)?)
}

/// The node whose hardware address the machine sends to for an address.
fn holder(cluster: &Cluster, address: Ipv4Addr) -> anyhow::Result<Ipv4Addr> {
    let mac = mac_of(cluster, address)?.with_context(|| format!("no neighbour entry for {address}"))?;
    for node in ["node-1", "node-2", "node-3"] {
        let own = node_address(cluster, node)?;
        forget(cluster, own)?;
        // Asks for it, if nothing else does.
        let _ = connects(cluster, own);
        if mac_of(cluster, own)?.as_deref() == Some(mac.as_str()) {
            return Ok(own);
        }
    }
    anyhow::bail!("no node has {mac}, which {address} leads to")
}

fn mac_of(cluster: &Cluster, address: Ipv4Addr) -> anyhow::Result<Option<String>> {
    let entry = shown(cluster, &["neigh", "show", "to", &address.to_string()])?;
    let mut words = entry.split_whitespace();
    Ok(words.find(|word| *word == "lladdr").and_then(|_| words.next()).map(str::to_owned))
}

fn node_address(cluster: &Cluster, node: &str) -> anyhow::Result<Ipv4Addr> {
    let path = "jsonpath={.status.addresses[?(@.type==\"InternalIP\")].address}";
    let text = cluster.kubectl(&["get", "node", node, "-o", path])?;
    match text.split_whitespace().next().context("an address")?.parse()? {
        IpAddr::V4(address) => Ok(address),
        IpAddr::V6(address) => anyhow::bail!("{address} is not IPv4"),
    }
}

/// The machine's end of a node's link, by the bridge's table of hardware addresses.
fn device_of(cluster: &Cluster, node: Ipv4Addr) -> anyhow::Result<String> {
    let mac = mac_of(cluster, node)?.context("the node's hardware address")?;
    let output = cluster.netns.command("bridge")?.args(["fdb", "show"]).output()?;
    let table = String::from_utf8(output.stdout)?;
    let entry = table.lines().find(|line| line.starts_with(&mac)).context("the node's port")?;
    let mut words = entry.split_whitespace();
    let device = words.find(|word| *word == "dev").and_then(|_| words.next()).context("a device")?;
    Ok(device.to_owned())
}
