//! The overlay between two nodes: pods reach each other, and nothing is left of a node that went.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::json;
use weft_agent_dataplane::node;
use weft_agent_dataplane::overlay::Overlay;
use weft_cni_netlink::Netlink;
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::require;

use crate::place::{ask_tcp, serve, within};

fn node_object(name: &str, number: u8) -> serde_json::Value {
    json!({"metadata": {"name": name}, "spec": {"podCIDR": format!("10.42.{number}.0/24")},
        "status": {"addresses": [{"type": "InternalIP", "address": format!("192.168.79.{number}")}]}})
}

fn overlay(number: u8, netns: &Netns, nodes: &[(&str, u8)]) -> Overlay {
    let mut overlay = Overlay::new(format!("node-{number}"), Ipv4Addr::new(192, 168, 79, number));
    for (name, n) in nodes {
        overlay.apply_node(&serde_json::from_value(node_object(name, *n)).unwrap());
    }
    within(netns, || {
        overlay.set_devices(&node::devices().unwrap());
        overlay.sync().unwrap();
        overlay
    })
}

#[test]
fn pods_of_two_nodes_reach_each_other() {
    if !require("dataplane::overlay", &["root", "ip"]) {
        return;
    }
    let netns: Vec<Netns> = (0..2).map(|_| Netns::new("ov").unwrap()).collect();
    let pods: Vec<Netns> = (0..2).map(|_| Netns::new("op").unwrap()).collect();
    let run = |command: String| ip(&command.split(' ').collect::<Vec<_>>()).unwrap();
    run(format!("-n {} link add up0 type veth peer name up0 netns {}", netns[0].name(), netns[1].name()));
    for number in 1..=2_u8 {
        let (n, p) = (netns[usize::from(number) - 1].name(), pods[usize::from(number) - 1].name());
        run(format!("-n {n} addr add 192.168.79.{number}/24 dev up0"));
        run(format!("-n {n} link set up0 up"));
        run(format!("-n {n} link add weft0 type bridge"));
        run(format!("-n {n} addr add 10.42.{number}.1/24 dev weft0"));
        run(format!("-n {n} link set weft0 up"));
        run(format!("-n {n} link add pod0 mtu 1450 type veth peer name eth0 mtu 1450 netns {p}"));
        run(format!("-n {n} link set pod0 master weft0 up"));
        run(format!("-n {p} addr add 10.42.{number}.2/24 dev eth0"));
        run(format!("-n {p} link set eth0 up"));
        run(format!("-n {p} route add default via 10.42.{number}.1"));
        within(&netns[usize::from(number) - 1], || std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))
            .unwrap();
    }
    let both = [("node-1", 1), ("node-2", 2)];
    let mut first = overlay(1, &netns[0], &both);
    let _second = overlay(2, &netns[1], &both);
    let server = serve(&pods[1], Ipv4Addr::new(10, 42, 2, 2), "far");
    assert_eq!(
        within(&pods[0], || ask_tcp(server)).unwrap(),
        "far 10.42.1.2",
        "pod to pod, by its own address"
    );
    assert_eq!(
        within(&netns[0], || ask_tcp(server)).unwrap(),
        "far 10.42.1.1",
        "node to pod, by the bridge's"
    );

    let state = || {
        within(&netns[0], || {
            let mut netlink = Netlink::open().unwrap();
            let device = netlink.link("weft.vx").unwrap();
            let routes = netlink.routes().unwrap().into_iter().filter(|r| r.index == device.index);
            let routes =
                routes.filter(|r| matches!(r.destination.ip(), IpAddr::V4(_)) && r.gateway.is_some()).count();
            let entries =
                (netlink.neighbours(device.index).unwrap().len(), netlink.fdb(device.index).unwrap().len());
            (device.mtu_bytes, routes, entries)
        })
    };
    assert_eq!(state(), (1_450, 1, (1, 1)));
    // A new agent that knows of no other node removes what it finds.
    let alone = overlay(1, &netns[0], &[("node-1", 1)]);
    assert!(!alone.is_dirty());
    assert_eq!(state(), (1_450, 0, (0, 0)));
    first.delete_node("node-2");
    within(&netns[0], || first.sync()).unwrap();
    assert_eq!(state(), (1_450, 0, (0, 0)), "what is gone already is no error");
}
