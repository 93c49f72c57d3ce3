//! Three nodes with a pod each: two on one link, the third behind a router.
//!
//! ```text
//! pod 1 ─ node 1 ─┐                                10.42.N.2, fd42:0:0:N::2    pod N
//!                 ├─ lan ─ router ─ node 3 ─ pod 3 192.168.79.N, fd79::N       nodes 1 and 2
//! pod 2 ─ node 2 ─┘                                192.168.80.3, fd80::3       node 3
//! ```

use std::net::IpAddr;

use serde_json::json;
use weft_agent_dataplane::node;
use weft_agent_dataplane::overlay::{DIRECT_RETURN, DIRECT_RETURN_VERSION, Overlay, Routing};
use weft_tests_harness::netns::{Netns, ip};

use crate::place::within;

/// Number of a node, from 1.
pub(crate) type Number = u8;

pub(crate) struct Links {
    pub(crate) nodes: Vec<Netns>,
    pub(crate) pods: Vec<Netns>,
    /// What joins nodes 1, 2 and the router.
    pub(crate) lan: Netns,
    pub(crate) router: Netns,
}

/// A pod's addresses.
pub(crate) fn pod(number: Number) -> [IpAddr; 2] {
    [format!("10.42.{number}.2"), format!("fd42:0:0:{number}::2")].map(|ip| ip.parse().unwrap())
}

/// A node's addresses.
pub(crate) fn address(number: Number) -> [IpAddr; 2] {
    let link = if number == 3 { 80 } else { 79 };
    [format!("192.168.{link}.{number}"), format!("fd{link}::{number}")].map(|ip| ip.parse().unwrap())
}

/// Runs `ip` with words that are separated by single blanks.
pub(crate) fn run(command: &str) {
    ip(&command.split(' ').collect::<Vec<_>>()).unwrap();
}

fn set(netns: &Netns, setting: &str, value: &str) {
    within(netns, || std::fs::write(format!("/proc/sys/net/{setting}"), value)).unwrap();
}

impl Links {
    pub(crate) fn new() -> Self {
        let netns = |label| {
            let netns = Netns::new(label).unwrap();
            // A bridge asks for a pod from its link-local address, which waits a second for duplicates.
            set(&netns, "ipv6/conf/default/accept_dad", "0");
            netns
        };
        let nodes: Vec<Netns> = (0..3).map(|_| netns("ln")).collect();
        let pods: Vec<Netns> = (0..3).map(|_| netns("lp")).collect();
        let (lan, router) = (netns("ll"), netns("lr"));
        let (l, r) = (lan.name(), router.name());
        run(&format!("-n {l} link add br0 type bridge"));
        run(&format!("-n {l} link set br0 up"));
        for (port, end, of) in
            [("n1", "up0", nodes[0].name()), ("n2", "up0", nodes[1].name()), ("r", "r0", r)]
        {
            run(&format!("-n {l} link add {port} type veth peer name {end} netns {of}"));
            run(&format!("-n {l} link set {port} master br0 up"));
        }
        run(&format!("-n {r} link add r1 type veth peer name up0 netns {}", nodes[2].name()));
        for (device, link) in [("r0", 79), ("r1", 80)] {
            run(&format!("-n {r} addr add 192.168.{link}.254/24 dev {device}"));
            run(&format!("-n {r} addr add fd{link}::fe/64 dev {device} nodad"));
            run(&format!("-n {r} link set {device} up"));
        }
        let links = Self { nodes, pods, lan, router };
        for number in 1..=3 {
            links.furnish(number);
        }
        for netns in links.nodes.iter().chain([&links.router]) {
            set(netns, "ipv4/ip_forward", "1");
            set(netns, "ipv6/conf/all/forwarding", "1");
        }
        links
    }

    /// Node, bridge and pod.
    fn furnish(&self, number: Number) {
        let (n, p) = (self.node(number).name(), self.pod(number).name());
        let ([v4, v6], link) = (address(number), if number == 3 { 80 } else { 79 });
        run(&format!("-n {n} addr add {v4}/24 dev up0"));
        run(&format!("-n {n} addr add {v6}/64 dev up0 nodad"));
        run(&format!("-n {n} link set up0 up"));
        run(&format!("-n {n} route add default via 192.168.{link}.254"));
        run(&format!("-n {n} route add default via fd{link}::fe"));
        run(&format!("-n {n} link add weft0 type bridge"));
        run(&format!("-n {n} addr add 10.42.{number}.1/24 dev weft0"));
        run(&format!("-n {n} addr add fd42:0:0:{number}::1/64 dev weft0 nodad"));
        run(&format!("-n {n} link set weft0 up"));
        run(&format!("-n {n} link add pod0 type veth peer name eth0 netns {p}"));
        run(&format!("-n {n} link set pod0 master weft0 up"));
        let [v4, v6] = pod(number);
        run(&format!("-n {p} addr add {v4}/24 dev eth0"));
        run(&format!("-n {p} addr add {v6}/64 dev eth0 nodad"));
        run(&format!("-n {p} link set eth0 up"));
        run(&format!("-n {p} route add default via 10.42.{number}.1"));
        run(&format!("-n {p} route add default via fd42:0:0:{number}::1"));
    }

    pub(crate) fn node(&self, number: Number) -> &Netns {
        &self.nodes[usize::from(number) - 1]
    }

    pub(crate) fn pod(&self, number: Number) -> &Netns {
        &self.pods[usize::from(number) - 1]
    }

    /// The overlay of a node, in force.
    pub(crate) fn overlay(&self, number: Number, routing: Routing) -> Overlay {
        let mut overlay = Overlay::new(format!("node-{number}"), address(number)[0], routing);
        for other in 1..=3 {
            let ranges = [format!("10.42.{other}.0/24"), format!("fd42:0:0:{other}::/64")];
            let addresses = address(other).map(|ip| json!({"type": "InternalIP", "address": ip}));
            let node = json!({"metadata": {"name": format!("node-{other}"), "annotations": {DIRECT_RETURN: DIRECT_RETURN_VERSION}},
                "spec": {"podCIDR": ranges[0], "podCIDRs": ranges}, "status": {"addresses": addresses}});
            overlay.apply_node(&serde_json::from_value(node).unwrap());
        }
        within(self.node(number), || {
            overlay.set_devices(&node::devices(Some(weft_agent_dataplane::BRIDGE)).unwrap());
            overlay.sync().unwrap();
            overlay
        })
    }
}
