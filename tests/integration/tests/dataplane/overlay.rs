//! The overlay between two nodes: pods reach each other, and nothing is left of a node that went.

use std::io::Write as _;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::Duration;

use futures::FutureExt as _;
use serde_json::json;
use weft_agent_dataplane::node;
use weft_agent_dataplane::overlay::{Overlay, Routing};
use weft_cni_netlink::Netlink;
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::require;

use crate::links::run;
use crate::place::{ask_tcp, serve, within};

/// A bound against waiting for ever.
const PATIENCE: Duration = Duration::from_secs(10);
/// More than fits in the buffers of a connection that gets nothing through.
const BODY_BYTES: usize = 8 << 20;

fn node_object(name: &str, number: u8, underlay: &str) -> serde_json::Value {
    let ranges = [format!("10.42.{number}.0/24"), format!("fd42:0:0:{number}::/64")];
    json!({"metadata": {"name": name}, "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
        "status": {"addresses": [{"type": "InternalIP", "address": format!("{underlay}{number}")}]}})
}

pub(crate) fn overlay(number: u8, (netns, underlay): (&Netns, &str), nodes: &[(&str, u8)]) -> Overlay {
    let address: IpAddr = format!("{underlay}{number}").parse().unwrap();
    let mut overlay = Overlay::new(format!("node-{number}"), address, Routing::Tunnel);
    for (name, n) in nodes {
        overlay.apply_node(&serde_json::from_value(node_object(name, *n, underlay)).unwrap());
    }
    within(netns, || {
        overlay.set_devices(&node::devices(Some(weft_agent_dataplane::BRIDGE)).unwrap());
        overlay.sync().unwrap();
        overlay
    })
}

/// Two nodes with a pod each, and a link between the nodes.
pub(crate) fn two_nodes() -> (Vec<Netns>, Vec<Netns>) {
    two_nodes_joined(|nodes| {
        let [first, second] = nodes else { panic!("two nodes") };
        run(&format!("-n {} link add up0 type veth peer name up0 netns {}", first.name(), second.name()));
    })
}

/// The same, with other devices `up0`.
pub(crate) fn two_nodes_joined(join: impl FnOnce(&[Netns])) -> (Vec<Netns>, Vec<Netns>) {
    let netns: Vec<Netns> = (0..2).map(|_| Netns::new("ov").unwrap()).collect();
    let pods: Vec<Netns> = (0..2).map(|_| Netns::new("op").unwrap()).collect();
    let set = |netns: &Netns, setting: &str, value: &str| {
        within(netns, || std::fs::write(format!("/proc/sys/net/{setting}"), value)).unwrap();
    };
    for netns in netns.iter().chain(&pods) {
        // A bridge asks for a pod from its link-local address, which waits a second for duplicates. The plugin tells it instead.
        set(netns, "ipv6/conf/default/accept_dad", "0");
    }
    join(&netns);
    for number in 1..=2_u8 {
        let (n, p) = (netns[usize::from(number) - 1].name(), pods[usize::from(number) - 1].name());
        run(&format!("-n {n} addr add 192.168.79.{number}/24 dev up0"));
        run(&format!("-n {n} addr add fd79::{number}/64 dev up0 nodad"));
        run(&format!("-n {n} link set up0 up"));
        run(&format!("-n {n} link add weft0 type bridge"));
        run(&format!("-n {n} addr add 10.42.{number}.1/24 dev weft0"));
        run(&format!("-n {n} addr add fd42:0:0:{number}::1/64 dev weft0 nodad"));
        run(&format!("-n {n} link set weft0 up"));
        run(&format!("-n {n} link add pod0 mtu 1430 type veth peer name eth0 mtu 1430 netns {p}"));
        run(&format!("-n {n} link set pod0 master weft0 up"));
        run(&format!("-n {p} addr add 10.42.{number}.2/24 dev eth0"));
        run(&format!("-n {p} addr add fd42:0:0:{number}::2/64 dev eth0 nodad"));
        run(&format!("-n {p} link set eth0 up"));
        run(&format!("-n {p} route add default via 10.42.{number}.1"));
        run(&format!("-n {p} route add default via fd42:0:0:{number}::1"));
        set(&netns[usize::from(number) - 1], "ipv4/ip_forward", "1");
        set(&netns[usize::from(number) - 1], "ipv6/conf/all/forwarding", "1");
    }
    (netns, pods)
}

#[test]
fn pods_of_two_nodes_reach_each_other() {
    if !require("dataplane::overlay", &["root", "ip"]) {
        return;
    }
    // Tunnels of either family carry both.
    for (underlay, mtu_bytes) in [("192.168.79.", 1_450), ("fd79::", 1_430)] {
        reach_each_other(underlay, mtu_bytes);
    }
}

fn reach_each_other(underlay: &str, mtu_bytes: u32) {
    let (netns, pods) = two_nodes();
    let both = [("node-1", 1), ("node-2", 2)];
    let mut first = overlay(1, (&netns[0], underlay), &both);
    let _second = overlay(2, (&netns[1], underlay), &both);
    for (network, last) in [("10.42.", ".2"), ("fd42:0:0:", "::2")] {
        let of = |number: u8, last: &str| -> IpAddr { format!("{network}{number}{last}").parse().unwrap() };
        let server = serve(&pods[1], of(2, last), "far");
        let (pod, bridge) = (of(1, last), of(1, &last.replace('2', "1")));
        assert_eq!(
            within(&pods[0], || ask_tcp(server)).unwrap(),
            format!("far {pod}"),
            "pod to pod, by its own address"
        );
        assert_eq!(
            within(&netns[0], || ask_tcp(server)).unwrap(),
            format!("far {bridge}"),
            "node to pod, by the bridge's"
        );
    }

    let state = || {
        within(&netns[0], || {
            let mut netlink = Netlink::open().unwrap();
            let device = netlink.link("weft.vx").unwrap();
            let routes = netlink.routes().unwrap().into_iter().filter(|r| r.index == device.index);
            let routes = routes.filter(|r| r.gateway.is_some()).count();
            let entries =
                (netlink.neighbours(device.index).unwrap().len(), netlink.fdb(device.index).unwrap().len());
            (device.mtu_bytes, routes, entries)
        })
    };
    assert_eq!(state(), (mtu_bytes, 2, (2, 1)));
    // A new agent that knows of no other node removes what it finds.
    let alone = overlay(1, (&netns[0], underlay), &[("node-1", 1)]);
    assert!(!alone.is_dirty());
    assert_eq!(state(), (mtu_bytes, 0, (0, 0)));
    first.delete_node("node-2");
    within(&netns[0], || first.sync()).unwrap();
    assert_eq!(state(), (mtu_bytes, 0, (0, 0)), "what is gone already is no error");
}

/// What the dataplane does with the kernel's events, without the rest of it.
pub(crate) fn repair(overlay: &mut Overlay, netns: &Netns, what: &str, damage: impl FnOnce() + Send) {
    within(netns, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut events = weft_cni_netlink::Events::subscribe().unwrap();
            damage();
            let heard = tokio::time::timeout(PATIENCE, async {
                while !overlay.is_dirty() {
                    for event in events.next().await.unwrap() {
                        overlay.observe(&event);
                    }
                    overlay.set_devices(&node::devices(Some(weft_agent_dataplane::BRIDGE)).unwrap());
                }
            });
            heard.await.unwrap_or_else(|_| panic!("nothing is heard of {what:?}"));
            // The kernel may tell of a damage in two steps. Its own repair is nothing to repair.
            for _ in 0..3 {
                overlay.sync().unwrap();
                while let Some(own) = events.next().now_or_never() {
                    own.unwrap().iter().for_each(|event| overlay.observe(event));
                }
            }
            assert!(!overlay.is_dirty(), "{what}");
        });
    });
}

#[test]
fn what_others_take_away_is_put_back() {
    if !require("dataplane::overlay_repair", &["root", "ip"]) {
        return;
    }
    let (netns, pods) = two_nodes();
    let both = [("node-1", 1), ("node-2", 2)];
    let mut first = overlay(1, (&netns[0], "192.168.79."), &both);
    let _second = overlay(2, (&netns[1], "192.168.79."), &both);
    within(&netns[0], || first.set_devices(&node::devices(Some(weft_agent_dataplane::BRIDGE)).unwrap()));
    let servers =
        ["10.42.2.2", "fd42:0:0:2::2"].map(|ip| serve(&pods[1], ip.parse::<IpAddr>().unwrap(), "far"));
    for damage in [
        "route del 10.42.2.0/24",
        "route replace 10.42.2.0/24 dev lo",
        "-6 route del fd42:0:0:2::/64",
        "neigh del 10.42.2.0 dev weft.vx",
        "neigh replace fe80::77:c0ff:fea8:4f02 lladdr 02:00:00:00:00:99 dev weft.vx nud permanent",
        "link set weft.vx down",
        "link del weft.vx",
    ] {
        let command: Vec<&str> = ["-n", netns[0].name()].into_iter().chain(damage.split(' ')).collect();
        repair(&mut first, &netns[0], damage, || ip(&command).unwrap());
        for server in servers {
            assert!(within(&pods[0], || ask_tcp(server)).is_ok(), "{server} after {damage}");
        }
    }
    repair(&mut first, &netns[0], "the loss of a forwarding entry", || {
        let mut netlink = Netlink::open().unwrap();
        let device = netlink.link("weft.vx").unwrap();
        for entry in netlink.fdb(device.index).unwrap() {
            netlink.delete_fdb(&entry).unwrap();
        }
    });
    assert!(within(&pods[0], || ask_tcp(servers[0])).is_ok());
}

/// The kernel tells a pod's connection that the way to one peer is narrower than the tunnel's device.
#[test]
fn a_narrow_way_to_a_peer_is_found() {
    if !require("dataplane::overlay_mtu", &["root", "ip"]) {
        return;
    }
    let (netns, pods) = two_nodes();
    let both = [("node-1", 1), ("node-2", 2)];
    let mut first = overlay(1, (&netns[0], "192.168.79."), &both);
    let _second = overlay(2, (&netns[1], "192.168.79."), &both);
    let narrow = ["-n", netns[0].name(), "route", "add", "192.168.79.2/32", "dev", "up0", "mtu", "1400"];
    repair(&mut first, &netns[0], "a narrow way", || ip(&narrow).unwrap());
    bodies_get_through_a_narrow_way(&pods);
}

#[test]
fn a_link_that_becomes_narrow_is_followed() {
    if !require("dataplane::overlay_link_mtu", &["root", "ip"]) {
        return;
    }
    let (netns, pods) = two_nodes();
    let both = [("node-1", 1), ("node-2", 2)];
    let mut first = overlay(1, (&netns[0], "192.168.79."), &both);
    let _second = overlay(2, (&netns[1], "192.168.79."), &both);
    let narrow = ["-n", netns[0].name(), "link", "set", "up0", "mtu", "1400"];
    repair(&mut first, &netns[0], "a narrow link", || ip(&narrow).unwrap());
    bodies_get_through_a_narrow_way(&pods);
    let wide = ["-n", netns[0].name(), "link", "set", "up0", "mtu", "1500"];
    repair(&mut first, &netns[0], "a wide link", || ip(&wide).unwrap());
    let mtu = |address: &str| {
        let route = within(&netns[0], || Netlink::open().unwrap().route_to(address.parse().unwrap()));
        route.unwrap().unwrap().mtu_bytes
    };
    assert_eq!(["10.42.2.2", "fd42:0:0:2::2"].map(mtu), [None; 2]);
}

/// And the pod's kernel was told what fits.
pub(crate) fn bodies_get_through_a_narrow_way(pods: &[Netns]) {
    for address in ["10.42.2.2", "fd42:0:0:2::2"] {
        let address: IpAddr = address.parse().unwrap();
        let listener = within(&pods[1], || TcpListener::bind((address, 0)).unwrap());
        let to = listener.local_addr().unwrap();
        let received = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            std::io::copy(&mut stream, &mut std::io::sink()).unwrap()
        });
        within(&pods[0], || {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(&[7; BODY_BYTES]).unwrap();
        });
        assert_eq!(received.join().unwrap(), u64::try_from(BODY_BYTES).unwrap(), "{address}");
        let route = std::process::Command::new("ip")
            .args(["-n", pods[0].name(), "route", "get", &address.to_string()])
            .output()
            .unwrap();
        let route = String::from_utf8_lossy(&route.stdout).into_owned();
        assert!(route.contains("mtu 1350"), "{route}");
    }
}
