//! The ways between two pods: weft's, the reference bridge plugin's, and wires.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::json;
use weft_tests_harness::cluster::Cluster;
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::wait_until;

use crate::cni::{Plugin, REFERENCE, call};
use crate::pair::load::Server;
use crate::pods::image;

const PORT: u16 = 8080;
/// Packets of a pod that has to go through a tunnel over Ethernet; the same for all but those who use the whole of the link.
const MTU_BYTES: u32 = 1450;
/// Packets of a pod by plain routes, where no other pods need the tunnel.
const LINK_MTU_BYTES: u32 = 1500;
const PATIENCE: Duration = Duration::from_secs(120);
/// Policies of C6.
const POLICIES: usize = 1_000;
/// The reference's VXLAN.
const VNI: u32 = 77;

/// Two pods and the way between them.
pub(super) struct Way {
    /// What it is called in a row.
    pub(super) name: &'static str,
    /// The namespace that asks.
    pub(super) client: File,
    /// Who answers.
    pub(super) server: Server,
    /// What it is made of.
    fabric: Fabric,
}

/// Kept while the way is used.
enum Fabric {
    Weft(Box<Cluster>),
    Namespaces { _all: Vec<Netns>, _state: Option<tempfile::TempDir> },
}

impl AsRef<Self> for Way {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Way {
    /// Takes it down; what can't be is an error.
    pub(super) fn end(self) -> anyhow::Result<()> {
        drop((self.server, self.client));
        match self.fabric {
            Fabric::Weft(mut cluster) => cluster.purge(),
            Fabric::Namespaces { .. } => Ok(()),
        }
    }
}

/// Which NetworkPolicies a cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Policies {
    None,
    /// A thousand that select other pods.
    OfOthers,
    /// A thousand that select both pods; one of them lets the client in.
    OfThePair,
}

/// A cluster started with these flags, with a pod on its first node and another on its last.
pub(super) fn weft(flags: &[&str], policies: Policies) -> anyhow::Result<Way> {
    let cluster = Cluster::start("c", flags)?;
    cluster.import(&image("busybox")?)?;
    let listed = cluster.kubectl(&["get", "nodes", "-o", "jsonpath={.items[*].metadata.name}"])?;
    let names: Vec<&str> = listed.split_whitespace().collect();
    let (first, last) = (names.first().context("no node")?, names.last().context("no node")?);
    let pod = |name: &str, node: &str| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
            "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [
                {"name": "main", "image": "busybox", "command": ["sleep", "100000"]}]}})
    };
    let mut objects = vec![pod("client", first), pod("server", last)];
    if policies != Policies::None {
        objects.extend((0..POLICIES).map(|number| policy(policies, number)));
    }
    cluster.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string())?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "pod/client", "pod/server", "--timeout=60s"])?;
    let [client, server] = ["client", "server"].map(|name| netns_of(&cluster, name));
    let (client, server) = (client?, server?);
    let address: Ipv4Addr =
        cluster.kubectl(&["get", "pod", "server", "-o", "jsonpath={.status.podIP}"])?.parse()?;
    if policies != Policies::None {
        known(&cluster)?;
    }
    let server = Server::start(&server, SocketAddrV4::new(address, PORT))?;
    let name = if policies == Policies::None { "no policy" } else { "policies" };
    Ok(Way { name, client, server, fabric: Fabric::Weft(Box::new(cluster)) })
}

fn policy(policies: Policies, number: usize) -> serde_json::Value {
    let (selector, from) = match policies {
        Policies::OfOthers => (json!({"matchLabels": {"app": format!("other-{number}")}}), json!({})),
        // Each lets in somebody else; the last one the client.
        Policies::None | Policies::OfThePair => {
            let who = if number + 1 == POLICIES { "client".to_owned() } else { format!("other-{number}") };
            (json!({}), json!({"matchLabels": {"app": who}}))
        }
    };
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": format!("policy-{number}")},
        "spec": {"podSelector": selector, "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": from}], "ports": [{"port": PORT}]}]}})
}

/// Waits until the node has taken in all policies.
fn known(cluster: &Cluster) -> anyhow::Result<()> {
    let wanted = format!("weft_policy_objects{{of=\"policies\"}} {POLICIES}");
    wait_until("the node knows all policies", PATIENCE, || {
        let output =
            cluster.netns.command("curl")?.args(["-s", "http://127.0.0.1:10249/metrics"]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).lines().any(|line| line == wanted).then_some(()))
    })
}

/// The network namespace of a pod.
fn netns_of(cluster: &Cluster, pod: &str) -> anyhow::Result<File> {
    let said = cluster.kubectl(&["exec", pod, "--", "readlink", "/proc/self/ns/net"])?;
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path().join("ns").join("net");
        // Processes come and go while this looks.
        if std::fs::read_link(&path).is_ok_and(|link| link.as_os_str() == said.trim())
            && let Ok(netns) = File::open(&path)
        {
            return Ok(netns);
        }
    }
    anyhow::bail!("no process is in the namespace of {pod}")
}

/// Two namespaces and a pair between them: nothing could cost less.
pub(super) fn wire() -> anyhow::Result<Way> {
    let (client, server) = (Netns::new("cw")?, Netns::new("cw")?);
    let (c, s) = (client.name(), server.name());
    run(&[
        format!("-n {c} link add eth0 mtu {MTU_BYTES} type veth peer name eth0 mtu {MTU_BYTES} netns {s}"),
        format!("-n {c} addr add 10.45.0.1/24 dev eth0"),
        format!("-n {s} addr add 10.45.0.2/24 dev eth0"),
        format!("-n {c} link set eth0 up"),
        format!("-n {s} link set eth0 up"),
    ])?;
    let at = SocketAddrV4::new(Ipv4Addr::new(10, 45, 0, 2), PORT);
    of_namespaces("a wire", at, vec![client, server], None)
}

/// Two pods by the reference plugin on one host.
pub(super) fn bridge() -> anyhow::Result<Way> {
    let state = folder()?;
    let host = Netns::new("cb")?;
    let (client, server) = (Netns::new("cb")?, Netns::new("cb")?);
    attach(&host, &client, (0, MTU_BYTES), state.path())?;
    let address = attach(&host, &server, (0, MTU_BYTES), state.path())?;
    let at = SocketAddrV4::new(address, PORT);
    of_namespaces("bridge plugin", at, vec![client, server, host], Some(state))
}

/// What joins two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Between {
    /// VXLAN with entries that never change.
    Tunnel,
    /// Routes, for packets that would fit a tunnel.
    Routes,
    /// Routes, for packets as large as the link takes.
    RoutesOfLink,
}

impl Between {
    fn mtu_bytes(self) -> u32 {
        match self {
            Self::Tunnel | Self::Routes => MTU_BYTES,
            Self::RoutesOfLink => LINK_MTU_BYTES,
        }
    }
}

/// A pod by the reference plugin on each of two hosts, with a link between them like weft's nodes.
pub(super) fn hosts(between: Between) -> anyhow::Result<Way> {
    let state = folder()?;
    let (under, hosts, pods) =
        (Netns::new("cu")?, [Netns::new("ch")?, Netns::new("ch")?], [Netns::new("cp")?, Netns::new("cp")?]);
    run(&[
        format!("-n {} link add u0 type bridge", under.name()),
        format!("-n {} link set u0 up", under.name()),
    ])?;
    let mut address = Ipv4Addr::UNSPECIFIED;
    for (number, (host, pod)) in (1_u8..).zip(hosts.iter().zip(&pods)) {
        let (u, h) = (under.name(), host.name());
        run(&[
            format!("-n {h} link add up0 type veth peer name n{number} netns {u}"),
            format!("-n {u} link set n{number} master u0 up"),
            format!("-n {h} addr add 192.168.81.{number}/24 dev up0"),
            format!("-n {h} link set up0 up"),
        ])?;
        address = attach(host, pod, (number, between.mtu_bytes()), state.path())?;
        join(host, number, 3 - number, between)?;
    }
    let [first, second] = hosts;
    let [client, server] = pods;
    let name = match between {
        Between::Tunnel => "bridge plugin and VXLAN",
        Between::Routes => "bridge plugin, no tunnel",
        Between::RoutesOfLink => "bridge plugin, no tunnel, 1500 bytes",
    };
    let at = SocketAddrV4::new(address, PORT);
    of_namespaces(name, at, vec![client, server, first, second, under], Some(state))
}

/// The way of a host to the pods of another.
fn join(host: &Netns, own: u8, other: u8, between: Between) -> anyhow::Result<()> {
    let h = host.name();
    if between != Between::Tunnel {
        return run(&[format!("-n {h} route add 10.45.{other}.0/24 via 192.168.81.{other}")]);
    }
    let mac = |number| format!("02:00:00:00:45:0{number}");
    run(&[
        format!(
            "-n {h} link add vx0 mtu {MTU_BYTES} address {} type vxlan id {VNI} local 192.168.81.{own} dstport 4789 nolearning",
            mac(own)
        ),
        format!("-n {h} link set vx0 up"),
        format!("-n {h} route add 10.45.{other}.0/24 via 10.45.{other}.0 dev vx0 onlink"),
        format!("-n {h} neigh add 10.45.{other}.0 lladdr {} dev vx0 nud permanent", mac(other)),
    ])?;
    let entry = ["fdb", "append", &mac(other), "dev", "vx0", "dst", &format!("192.168.81.{other}")];
    let status = host.command("bridge")?.args(entry).status().context("run bridge")?;
    ensure!(status.success(), "bridge fdb append: {status}");
    Ok(())
}

fn folder() -> anyhow::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix("weft-bench-").tempdir().context("make a folder for leases")
}

/// Attaches a pod by the reference plugin, with the features that ours has.
fn attach(host: &Netns, pod: &Netns, (number, mtu): (u8, u32), state: &Path) -> anyhow::Result<Ipv4Addr> {
    let program = Path::new(REFERENCE).join("bridge");
    ensure!(program.is_file(), "no {}; install containernetworking-plugins", program.display());
    let config = json!({
        "cniVersion": "1.0.0", "name": format!("peer{number}"), "type": "bridge", "bridge": "bench0", "mtu": mtu,
        "isDefaultGateway": true, "hairpinMode": true,
        "ipam": {"type": "host-local", "subnet": format!("10.45.{number}.0/24"), "gateway": format!("10.45.{number}.1"),
            "dataDir": state},
    });
    let answer = call(&Plugin { program, config }, "ADD", host, pod)?;
    let answer: serde_json::Value = serde_json::from_slice(&answer).context("ADD's answer is no JSON")?;
    let address = answer["ips"][0]["address"].as_str().and_then(|network| network.split('/').next());
    address.context("ADD answered no address")?.parse().context("ADD's address")
}

fn run(commands: &[String]) -> anyhow::Result<()> {
    commands.iter().try_for_each(|command| ip(&command.split(' ').collect::<Vec<_>>()))
}

/// The first namespace asks, the second answers.
fn of_namespaces(
    name: &'static str,
    at: SocketAddrV4,
    all: Vec<Netns>,
    state: Option<tempfile::TempDir>,
) -> anyhow::Result<Way> {
    let open = |netns: &Netns| File::open(netns.path()).context("open a namespace");
    let server = Server::start(&open(&all[1])?, at)?;
    let client = open(&all[0])?;
    Ok(Way { name, client, server, fabric: Fabric::Namespaces { _all: all, _state: state } })
}
