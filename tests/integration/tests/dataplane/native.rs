//! Pods of nodes on one link: reached by plain routes, by the tunnel, and by either while they are changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane::node;
use weft_agent_dataplane::overlay::{self, Overlay, Ranges, Routing, trial};
use weft_cni_netlink::Netlink;
use weft_ebpf_abi::names;
use weft_tests_harness::netns::Netns;
use weft_tests_harness::require;

use crate::NEEDS;
use crate::crossing::{Side, echo};
use crate::links::{Links, Number, address, pod, run};
use crate::overlay::repair;
use crate::place::{self, ask_again, ask_datagram, ask_tcp, ask_udp, connected_udp, serve, within};
use crate::podedge::{received, sent};

/// A bound against waiting for ever.
const PATIENCE: Duration = Duration::from_secs(10);
/// Datagrams of a look at counters; other packets are far fewer.
const MANY: u64 = 200;
/// What the nodes' link takes, and headers of UDP.
const LINK_MTU_BYTES: usize = 1_500;
const UDP_BYTES: usize = 8;

/// Device and router by which a node sends to a pod.
fn way(from: &Netns, to: IpAddr) -> (String, Option<IpAddr>) {
    within(from, || {
        let mut netlink = Netlink::open().unwrap();
        let route = netlink.route_to(to).unwrap().unwrap();
        let link = netlink.links().unwrap().into_iter().find(|link| link.index == route.index).unwrap();
        (link.name, route.gateway)
    })
}

fn goes_by_link(from: &Netns, to: Number) -> bool {
    let ways = [0, 1].map(|family| {
        let (device, gateway) = way(from, pod(to)[family]);
        (device == "up0", gateway == Some(address(to)[family]))
    });
    assert!(ways[0] == ways[1] && ways[0].0 == ways[0].1, "{ways:?}");
    ways[0].0
}

/// Both overlays, as a node is moved behind the router for the other, or back.
fn reroute(links: &Links, overlays: &mut [Overlay], by_router: bool) {
    for (number, other) in [(1, 2), (2, 1)] {
        let node = links.node(number);
        let [v4, v6] = address(other);
        for (host, router) in [(format!("{v4}/32"), "192.168.79.254"), (format!("{v6}/128"), "fd79::fe")] {
            let change = if by_router { "add" } else { "del" };
            let command = format!("-n {} route {change} {host} via {router}", node.name());
            repair(&mut overlays[usize::from(number) - 1], node, &command, || run(&command));
        }
    }
}

/// A datagram that nobody may cut: of IPv4 the kernel says so by itself.
fn ask_whole(to: SocketAddr, packet_bytes: usize) -> std::io::Result<usize> {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
    let header = if to.is_ipv4() {
        20
    } else {
        setsockopt(&socket, sockopt::Ipv6DontFrag, &true).unwrap();
        40
    };
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send_to(&vec![7; packet_bytes - header - UDP_BYTES], to)?;
    socket.recv(&mut [0; 64])
}

#[test]
fn nodes_on_a_link_do_without_the_tunnel_and_others_keep_it() {
    if !require("dataplane::native", &["root", "ip"]) {
        return;
    }
    let links = Links::new();
    let overlays = [1, 2, 3].map(|number| links.overlay(number, Routing::Native));
    assert!(overlays.iter().all(|overlay| !overlay.is_dirty()));
    for (from, to, by_link) in [(1, 2, true), (2, 1, true), (1, 3, false), (3, 1, false), (3, 2, false)] {
        assert_eq!(goes_by_link(links.node(from), to), by_link, "from {from} to {to}");
        for family in [0, 1] {
            let server = serve(links.pod(to), pod(to)[family], "there");
            let says = within(links.pod(from), || ask_tcp(server)).unwrap();
            assert_eq!(says, format!("there {}", pod(from)[family]), "by its own address");
            within(links.node(from), || ask_tcp(server)).unwrap();
            let before = sent(links.node(from), "weft.vx");
            within(links.pod(from), || (0..MANY).for_each(|_| drop(ask_udp(server).unwrap())));
            let by_tunnel = sent(links.node(from), "weft.vx") - before;
            assert_eq!(by_tunnel >= MANY, !by_link, "{by_tunnel} packets by the tunnel from {from} to {to}");
            if by_link {
                let whole = within(links.pod(from), || ask_whole(server, LINK_MTU_BYTES));
                assert!(whole.is_ok(), "from {from} to {to}: {whole:?}");
            }
            // Of what is too large for the tunnel, the pods are told.
            echo(links.pod(from), links.pod(to), pod(to)[family]);
        }
    }
    let near = overlays[0].near();
    assert_eq!(near.keys().map(ToString::to_string).collect::<Vec<_>>(), ["10.42.2.0/24", "fd42:0:0:2::/64"]);
    let direct = overlays[0].direct();
    let takes = |range: &str| direct[&range.parse().unwrap()];
    assert_eq!(
        ["10.42.2.0/24", "192.168.79.2/32", "fd79::2/128"].map(takes),
        [0; 3],
        "what needs a tunnel has none"
    );
    assert_eq!(["10.42.3.0/24", "fd42:0:0:3::/64"].map(takes), [1_450; 2]);
}

#[test]
fn an_agent_that_comes_with_another_flag_leaves_nothing_of_the_earlier_one() {
    if !require("dataplane::native-flag", &["root", "ip"]) {
        return;
    }
    let links = Links::new();
    let routes = |number: Number| {
        within(links.node(number), || {
            let routes = Netlink::open().unwrap().routes().unwrap().into_iter();
            routes.filter(|route| (10..=254).contains(&route.protocol)).count()
        })
    };
    let steps = [(Routing::Tunnel, 4, false), (Routing::Native, 6, true), (Routing::Auto, 6, false)];
    for (routing, count, by_link) in steps.into_iter().chain([(Routing::Native, 6, true), steps[0]]) {
        let _overlays = [1, 2].map(|number| links.overlay(number, routing));
        assert_eq!((routes(1), goes_by_link(links.node(1), 2)), (count, by_link), "{routing}");
        let server = serve(links.pod(2), pod(2)[0], "there");
        within(links.pod(1), || ask_tcp(server)).unwrap();
    }
    let _overlay = links.overlay(1, Routing::Native);
    within(links.node(1), overlay::cleanup).unwrap();
    within(links.node(1), overlay::cleanup).unwrap();
    assert_eq!(routes(1), 0);
}

#[test]
fn connections_outlive_a_change_of_the_way() {
    if !require("dataplane::native-switch", &["root", "ip"]) {
        return;
    }
    let links = Links::new();
    let mut overlays = [1, 2].map(|number| links.overlay(number, Routing::Native));
    let servers = pod(2).map(|address| serve(links.pod(2), address, "there"));
    let mut streams = servers.map(|server| within(links.pod(1), || TcpStream::connect(server)).unwrap());
    let mut ask = |when: &str| {
        for stream in &mut streams {
            ask_again(stream).unwrap_or_else(|error| panic!("{when}: {error}"));
        }
    };
    ask("by the link");
    for _ in 0..2 {
        reroute(&links, &mut overlays, true);
        assert!(!goes_by_link(links.node(1), 2) && !goes_by_link(links.node(2), 1));
        ask("by the tunnel");
        reroute(&links, &mut overlays, false);
        assert!(goes_by_link(links.node(1), 2) && goes_by_link(links.node(2), 1));
        ask("by the link again");
    }
}

#[test]
fn what_others_take_away_of_plain_routes_is_put_back() {
    if !require("dataplane::native-repair", &["root", "ip"]) {
        return;
    }
    let links = Links::new();
    let mut first = links.overlay(1, Routing::Native);
    let _second = links.overlay(2, Routing::Native);
    let servers = pod(2).map(|address| serve(links.pod(2), address, "there"));
    for damage in [
        "route del 10.42.2.0/24 via 192.168.79.2",
        "route del 10.42.2.0/24 dev weft.vx",
        "route replace 10.42.2.0/24 via 192.168.79.254",
        "-6 route del fd42:0:0:2::/64 via fd79::2",
        "-6 route del fd42:0:0:2::/64 dev weft.vx",
        "neigh del 10.42.2.0 dev weft.vx",
        "link set weft.vx down",
        "link del weft.vx",
        "link set up0 mtu 1400",
        "link set up0 mtu 1500",
    ] {
        let command = format!("-n {} {damage}", links.node(1).name());
        repair(&mut first, links.node(1), damage, || run(&command));
        assert!(goes_by_link(links.node(1), 2), "{damage}");
        for server in servers {
            assert!(within(links.pod(1), || ask_tcp(server)).is_ok(), "{server} after {damage}");
        }
        let routes = within(links.node(1), || Netlink::open().unwrap().routes().unwrap());
        let second = routes.iter().filter(|route| route.metric == 4_096).count();
        assert_eq!(second, 2, "a way behind each plain route after {damage}");
    }
}

#[test]
fn the_link_goes_down_and_comes_back() {
    if !require("dataplane::native-link", &["root", "ip"]) {
        return;
    }
    let links = Links::new();
    let mut first = links.overlay(1, Routing::Native);
    let _second = links.overlay(2, Routing::Native);
    let n = links.node(1).name();
    let down = format!("-n {n} link set up0 down");
    repair(&mut first, links.node(1), "link down", || run(&down));
    assert_eq!(way(links.node(1), pod(2)[0]).0, "weft.vx");
    assert!(first.near().is_empty());
    for command in [
        format!("-n {n} link set up0 up"),
        // The kernel takes IPv6 addresses from a device that goes down.
        format!("-n {n} addr replace fd79::1/64 dev up0 nodad"),
    ] {
        repair(&mut first, links.node(1), &command, || run(&command));
    }
    assert!(goes_by_link(links.node(1), 2));
    for address in pod(2) {
        let server = serve(links.pod(2), address, "there");
        within(links.pod(1), || ask_tcp(server)).unwrap();
    }
}

/// Tells a node's programs of its overlay, as the agent does.
fn tell(side: &mut Side, near: &mut Ranges, node: &Netns, overlay: &Overlay) {
    near.set(&overlay.near()).unwrap();
    within(node, || {
        let devices = node::devices(Some(weft_agent_dataplane::BRIDGE)).unwrap();
        let identity = place::identity(&devices, &side.cgroup).unwrap();
        side.running.programs.configure(overlay.describe(identity)).unwrap();
    });
}

#[test]
fn the_short_way_goes_by_the_link_too() {
    if !require("dataplane::native-short", &NEEDS) {
        return;
    }
    let links = Links::new();
    let mut overlays = [1, 2].map(|number| links.overlay(number, Routing::Native));
    let mut sides = [1, 2].map(|number| Side::start(links.node(number)));
    let mut near = [0, 1].map(|at: usize| Ranges::adopt(&sides[at].running.programs, names::NEAR).unwrap());
    for (at, number) in [(0, 1), (1, 2)] {
        sides[at].publish(links.node(number), pod(number), &[]);
        tell(&mut sides[at], &mut near[at], links.node(number), &overlays[at]);
    }
    let servers = pod(2).map(|address| serve(links.pod(2), address, "there"));
    // What no socket hook sees, translated packet by packet at the pod's edge.
    sides[0].running.service(10, 0, &servers[..1]).unwrap();
    let mut flows = [place::vip(10), servers[0], servers[1]]
        .map(|to| within(links.pod(1), || (connected_udp(to), TcpStream::connect(to).unwrap())));
    let mut ask = |when: &str| {
        for (datagrams, stream) in &mut flows {
            let own = pod(1)[usize::from(datagrams.peer_addr().unwrap().is_ipv6())];
            let says = [ask_datagram(datagrams), ask_again(stream)]
                .map(|says| says.unwrap_or_else(|error| panic!("{when}: {error}")));
            assert_eq!(says, [format!("there {own}"), format!("there {own}")], "{when}");
        }
    };
    for round in 0..2 {
        for by_link in [true, false] {
            if !(round == 0 && by_link) {
                // As the agent does: what may change is the tunnel's meanwhile, which there is a route for at any time.
                near.iter_mut().for_each(|near| near.set(&BTreeMap::new()).unwrap());
                ask("as the programs know nothing");
                reroute(&links, &mut overlays, !by_link);
            }
            assert_eq!(goes_by_link(links.node(1), 2), by_link);
            ask("before the programs know all");
            for (at, number) in [(0, 1), (1, 2)] {
                tell(&mut sides[at], &mut near[at], links.node(number), &overlays[at]);
            }
            ask("as the programs know");
            for server in servers.into_iter().chain([place::vip(10)]) {
                let count = || {
                    [
                        sent(links.node(1), "weft.vx"),
                        sent(links.node(2), "pod0") + received(links.node(1), "weft0"),
                    ]
                };
                let before = count();
                within(links.pod(1), || (0..MANY).for_each(|_| drop(ask_udp(server).unwrap())));
                let after = count();
                assert_eq!(after[0] - before[0] >= MANY, !by_link, "{server}: by the tunnel");
                assert!(after[1] - before[1] < MANY / 2, "{server}: by bridge and stack");
            }
            for address in pod(2) {
                echo(links.pod(1), links.pod(2), address);
            }
        }
    }
}

/// What joins the nodes drops packets with pods' addresses, as clouds do, or no longer.
fn drop_pods_packets(lan: &Netns, dropped: bool) {
    let nft = |words: &str| {
        let status = lan.command("nft").unwrap().args(words.split(' ')).status().unwrap();
        assert!(status.success(), "nft {words}");
    };
    if !dropped {
        return nft("delete table bridge fabric");
    }
    nft("add table bridge fabric");
    nft("add chain bridge fabric c { type filter hook forward priority 0 ; }");
    nft("add rule bridge fabric c ip saddr 10.42.0.0/16 drop");
    nft("add rule bridge fabric c ip6 saddr fd42::/16 drop");
}

#[test]
fn a_link_is_used_as_long_as_packets_are_seen_to_get_there() {
    if !require("dataplane::native-auto", &["root", "ip", "nft"]) {
        return;
    }
    let links = Links::new();
    for number in [1, 2] {
        // The answers come by the tunnel, as only one of the nodes has seen anything: a strict kernel would drop them.
        within(links.node(number), || std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "1")).unwrap();
    }
    let mut first = links.overlay(1, Routing::Auto);
    let _second = links.overlay(2, Routing::Auto);
    assert!(!goes_by_link(links.node(1), 2) && first.near().is_empty());
    assert_eq!(first.trials().len(), 2, "a range of each family: node 3 is not on the link");
    let mut streams = pod(2).map(|address| {
        let server = serve(links.pod(2), address, "there");
        within(links.pod(1), || TcpStream::connect(server)).unwrap()
    });
    within(links.node(1), || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (_trials, to_try) = watch::channel(first.trials());
            let (prove, mut proven) = watch::channel(BTreeSet::new());
            let trying = tokio::spawn(trial::run(to_try, prove, CancellationToken::new()));
            for by_link in [true, false, true] {
                let count = if by_link { 2 } else { 0 };
                let seen = tokio::time::timeout(PATIENCE, proven.wait_for(|proven| proven.len() == count));
                let seen = seen.await.map(|seen| seen.unwrap().clone());
                let seen = seen.unwrap_or_else(|_| panic!("by link: {by_link}, {:?}", *proven.borrow()));
                first.set_proven(seen);
                first.sync().unwrap();
                assert_eq!(goes_by_link(links.node(1), 2), by_link);
                for stream in &mut streams {
                    ask_again(stream).unwrap_or_else(|error| {
                        panic!("{:?} by link {by_link}: {error}", stream.peer_addr())
                    });
                }
                drop_pods_packets(&links.lan, by_link);
            }
            trying.abort();
        });
    });
}
