//! What pods send out of the cluster: from their node's address, or from their own where they are told to.

use std::net::IpAddr;

use anyhow::ensure;
use weft_tests_e2e::{cluster, seen_outside, sleeper};
use weft_tests_harness::netns::ip;

/// Addresses of the machine that the nodes are on.
const MACHINE: [&str; 2] = ["10.44.0.1", "fd44::1"];
const NODE: [&str; 2] = ["10.44.0.3", "fd44::3"];
/// Of each family one address of the machine is an exception.
const FLAGS: [&str; 8] = [
    "--nodes",
    "2",
    "--cluster-cidr",
    "10.42.0.0/16,fd42::/56",
    "--service-cidr",
    "10.43.0.0/16,fd43::/112",
    "--non-masquerade-cidrs",
    "10.44.0.1/32,fd44::1/128",
];

#[test]
fn pods_keep_their_addresses_towards_exceptions() -> anyhow::Result<()> {
    let test = "egress::pods_keep_their_addresses_towards_exceptions";
    let Some(mut cluster) = cluster(test, "egress", &FLAGS)? else { return Ok(()) };
    let machine = cluster.netns.name().to_owned();
    let run = |command: &str| ip(&["-n", &machine].into_iter().chain(command.split(' ')).collect::<Vec<_>>());
    cluster.apply(&sleeper("client", Some("node-2")))?;
    cluster.kubectl(&["wait", "--for=condition=Ready", "--timeout=60s", "pod/client"])?;
    let pods = cluster.kubectl(&["get", "pod", "client", "-o", "jsonpath={.status.podIPs[*].ip}"])?;
    for ((listen, node), pod) in MACHINE.into_iter().zip(NODE).zip(pods.split(' ')) {
        // The machine has routes to the pods of its nodes.
        let listen: IpAddr = listen.parse()?;
        let seen = seen_outside(&cluster, "client", listen)?;
        ensure!(seen == pod.parse::<IpAddr>()?, "{listen} saw {seen}, the pod is {pod}");
        // The other addresses there are no exceptions.
        let other: IpAddr = if listen.is_ipv4() { "10.44.0.200".parse()? } else { "fd44::c8".parse()? };
        let nodad = if listen.is_ipv6() { " nodad" } else { "" };
        run(&format!("addr add {other}/{} dev weftu0{nodad}", if listen.is_ipv4() { 32 } else { 128 }))?;
        let seen = seen_outside(&cluster, "client", other)?;
        ensure!(seen == node.parse::<IpAddr>()?, "{other} saw {seen}, the node is {node}");
    }
    cluster.purge()
}
