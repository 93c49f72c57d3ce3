//! Against the kernel, in network namespaces of the test's own.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use weft_cni_netlink::hostport::HostPort;
use weft_cni_netlink::{
    Class, FdbEntry, LinkChange, Mac, Neighbour, Netlink, Route, Shape, VethEnd, Vxlan, guard, hostport,
    masquerade, namespace, sysctl,
};
use weft_tests_harness::netns::Netns;
use weft_tests_harness::require;

/// Runs `work` in the namespace.
fn within<T: Send>(netns: &Netns, work: impl FnOnce() -> T + Send) -> T {
    namespace::within(&netns.path(), work).unwrap()
}

/// What nftables hold, as nft prints it.
fn ruleset(netns: &Netns) -> String {
    let output = netns.command("nft").unwrap().args(["list", "ruleset"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn devices_addresses_routes_and_entries_are_made_found_and_removed() {
    if !require("netlink::devices", &["root", "ip"]) {
        return;
    }
    let netns = Netns::new("nl").unwrap();
    let other = Netns::new("nl").unwrap();
    let peer = namespace::open(&other.path()).unwrap();
    within(&netns, || {
        let mut netlink = Netlink::open().unwrap();
        let before = netlink.links().unwrap();
        let bridge = netlink.ensure_bridge("br-a", 1400).unwrap();
        assert_eq!(netlink.ensure_bridge("br-a", 1400).unwrap().index, bridge.index);
        netlink.add_address(bridge.index, "10.9.0.1/24".parse().unwrap()).unwrap();
        netlink.add_address(bridge.index, "10.9.0.1/24".parse().unwrap()).unwrap();
        let mac = Mac([2, 0, 10, 9, 0, 7]);
        let host = VethEnd { name: "ve-a", mac: None, mtu_bytes: 1400 };
        let inside = VethEnd { name: "eth0", mac: Some(mac), mtu_bytes: 1400 };
        netlink.create_veth(&host, &inside, Some(peer.as_fd())).unwrap();
        let port = netlink.link("ve-a").unwrap();
        netlink
            .change_link(port.index, &LinkChange { master: Some(bridge.index), ..Default::default() })
            .unwrap();
        netlink.set_hairpin(port.index, true).unwrap();
        assert_eq!(netlink.link("ve-a").unwrap().master, Some(bridge.index));

        let local = Ipv4Addr::new(10, 9, 0, 1).into();
        let vxlan =
            Vxlan { name: "vx-a", vni: 77, port: 8472, local, mac: Mac([2, 0, 0, 0, 0, 1]), mtu_bytes: 1350 };
        netlink.create_vxlan(&vxlan).unwrap();
        let vx = netlink.link("vx-a").unwrap();
        assert_eq!((vx.kind.as_str(), vx.mtu_bytes, vx.up), ("vxlan", 1350, true));
        let entry = FdbEntry { index: vx.index, mac, remote: Ipv4Addr::new(10, 9, 0, 2).into() };
        netlink.put_fdb(&entry).unwrap();
        assert!(netlink.fdb(vx.index).unwrap().contains(&entry));
        let neighbour = Neighbour { index: vx.index, address: "10.8.1.0".parse().unwrap(), mac };
        netlink.put_neighbour(&neighbour).unwrap();
        assert_eq!(netlink.neighbours(vx.index).unwrap(), [neighbour]);
        let mut route = Route::new("10.8.1.0/24".parse().unwrap(), vx.index);
        route.gateway = Some("10.8.1.0".parse().unwrap());
        route.onlink = true;
        netlink.put_route(&route).unwrap();
        netlink.put_route(&route).unwrap();
        assert!(netlink.routes().unwrap().contains(&route));

        netlink.delete_route(&route).unwrap();
        netlink.delete_route(&route).unwrap();
        netlink.delete_fdb(&entry).unwrap();
        netlink.delete_neighbour(&neighbour).unwrap();
        assert!(netlink.fdb(vx.index).unwrap().is_empty());
        for name in ["vx-a", "ve-a", "br-a", "br-a"] {
            netlink.delete_link_named(name).unwrap();
        }
        assert_eq!(netlink.links().unwrap(), before);
    });
}

#[test]
fn a_pair_that_is_deleted_early_is_found_by_nobody() {
    if !require("netlink::early", &["root", "ip"]) {
        return;
    }
    let netns = Netns::new("nl").unwrap();
    let other = Netns::new("nl").unwrap();
    let peer = namespace::open(&other.path()).unwrap();
    within(&netns, || {
        let mut netlink = Netlink::open().unwrap();
        let bridge = netlink.ensure_bridge("br-a", 1400).unwrap().index;
        let end = |name| VethEnd { name, mac: None, mtu_bytes: 1400 };
        for _ in 0..20 {
            // The same names at once again.
            netlink.create_veth_port(&end("ve-a"), &end("eth0"), Some(peer.as_fd()), Some(bridge)).unwrap();
            netlink.delete_link_early("ve-a").unwrap();
            assert_eq!(netlink.link("ve-a").unwrap_err().class(), Class::NotFound);
            let inside = within(&other, || Netlink::open().unwrap().link("eth0").unwrap_err());
            assert_eq!(inside.class(), Class::NotFound);
            netlink.delete_link_early("ve-a").unwrap();
        }
        // What the kernel refuses is an error, not a wait.
        assert!(netlink.delete_link_early("lo").is_err());
    });
}

#[test]
fn the_masquerade_rules_are_replaced_and_removed() {
    if !require("netlink::masquerade", &["root", "ip", "nft"]) {
        return;
    }
    let netns = Netns::new("nl").unwrap();
    let ensure = |pods: &[&str], exceptions: &[&str]| {
        let parse = |all: &[&str]| all.iter().map(|one| one.parse().unwrap()).collect::<Vec<_>>();
        let (pods, exceptions) = (parse(pods), parse(exceptions));
        within(&netns, || masquerade::ensure(&pods, &exceptions).unwrap());
        ruleset(&netns)
    };
    ensure(&["10.42.0.0/16"], &[]);
    let v4 = "ip saddr 10.42.0.0/16 ip daddr != 10.42.0.0/16 masquerade fully-random";
    let present = ensure(&["10.42.0.0/16"], &[]);
    assert_eq!(present.matches(v4).count(), 1, "{present}");
    assert!(!present.contains("ip6"), "{present}");

    let present = ensure(&["10.42.0.0/16", "fd00:42::/48"], &["fd00:99::/32", "192.0.2.0/24"]);
    let v6 = "ip6 saddr fd00:42::/48 ip6 daddr != fd00:42::/48 ip6 daddr != fd00:99::/32 masquerade";
    let v4 = "ip saddr 10.42.0.0/16 ip daddr != 10.42.0.0/16 ip daddr != 192.0.2.0/24 masquerade";
    assert_eq!((present.matches(v4).count(), present.matches(v6).count()), (1, 1), "{present}");
    let present = ensure(&["fd00:42::/48"], &[]);
    assert!(!present.contains("10.42") && present.contains("fd00:42::/48 masquerade"), "{present}");
    within(&netns, || {
        masquerade::remove().unwrap();
        masquerade::remove().unwrap();
    });
    assert_eq!(ruleset(&netns), "");
}

#[test]
fn the_guard_of_tunnels_is_replaced_and_removed() {
    if !require("netlink::guard", &["root", "ip", "nft"]) {
        return;
    }
    let netns = Netns::new("nl").unwrap();
    let ensure = |pods: &[&str]| {
        let pods: Vec<_> = pods.iter().map(|range| range.parse().unwrap()).collect();
        within(&netns, || guard::ensure("weft0", &pods, 8472).unwrap());
        ruleset(&netns)
    };
    ensure(&["10.99.0.0/16", "fd99::/48"]);
    let present = ensure(&["10.42.0.0/16"]);
    // A family without pods' addresses has those of the link.
    for rule in [
        "ip daddr != 10.42.0.0/16 udp dport 8472 drop",
        "ip daddr 10.42.0.0/16 fib daddr type local udp dport 8472 drop",
        "iifname \"weft0\" udp dport 8472 drop",
    ] {
        assert_eq!(present.matches(rule).count(), 1, "{rule} in {present}");
    }
    assert!(!present.contains("99"), "{present}");
    within(&netns, || {
        guard::remove().unwrap();
        guard::remove().unwrap();
    });
    assert_eq!(ruleset(&netns), "");
}

#[test]
fn host_ports_are_added_found_and_removed() {
    if !require("netlink::hostport", &["root", "ip", "nft"]) {
        return;
    }
    let netns = Netns::new("nl").unwrap();
    let port = |host: Option<&str>, port, pod: &str| HostPort {
        host: host.map(|host| host.parse().unwrap()),
        port,
        protocol: 6,
        pod: pod.parse().unwrap(),
        pod_port: 80,
    };
    let all = [
        port(None, 8080, "10.42.1.7"),
        port(Some("192.0.2.1"), 8081, "10.42.1.7"),
        port(None, 8080, "fd00::7"),
        port(Some("2001:db8::1"), 8081, "fd00::7"),
    ];
    within(&netns, || {
        assert_eq!(hostport::missing(&all).unwrap(), all);
        for _ in 0..2 {
            hostport::add(&all, "weft0").unwrap();
        }
        assert_eq!(hostport::missing(&all).unwrap(), []);
        let taken = hostport::add(&[port(None, 8080, "10.42.1.8")], "weft0").unwrap_err();
        assert_eq!(taken.class(), Class::Exists, "{taken:?}");
        hostport::add(&[port(None, 8082, "10.42.1.8")], "weft0").unwrap();
    });
    let present = ruleset(&netns);
    for wanted in [
        "type inet_proto . inet_service : ipv4_addr . inet_service",
        "tcp . 8080 : 10.42.1.7 . 80",
        "192.0.2.1 . tcp . 8081 : 10.42.1.7 . 80",
        "tcp . 8080 : fd00::7 . 80",
        "2001:db8::1 . tcp . 8081 : fd00::7 . 80",
        "dnat ip to ip daddr . meta l4proto . th dport map @addressed",
        "fib daddr type local dnat ip6 to meta l4proto . th dport map @any",
        "iifname @near meta mark set meta mark | 0x00100000",
        "iifname != \"lo\" ip daddr 127.0.0.0/8 drop",
        "meta mark & 0x00100000 == 0x00100000 masquerade fully-random",
    ] {
        assert!(present.contains(wanted), "no {wanted} in {present}");
    }
    // What nft lists, it can load again.
    std::fs::write(format!("/tmp/{}.nft", netns.name()), &present).unwrap();
    let file = format!("/tmp/{}.nft", netns.name());
    let loaded = netns.command("nft").unwrap().args(["-c", "-f", &file]).output().unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    within(&netns, || {
        for _ in 0..2 {
            hostport::remove(&["10.42.1.7".parse().unwrap(), "fd00::7".parse().unwrap()]).unwrap();
            hostport::forget_device("weft0").unwrap();
        }
        assert_eq!(hostport::missing(&all).unwrap(), all);
    });
    let left = ruleset(&netns);
    assert!(left.contains("tcp . 8082 : 10.42.1.8 . 80") && !left.contains("8081"), "{left}");
    assert!(!left.contains("weft0"), "{left}");
    within(&netns, || {
        hostport::remove_all().unwrap();
        hostport::remove_all().unwrap();
    });
    assert_eq!(ruleset(&netns), "");
}

#[test]
fn a_rate_is_bounded() {
    if !require("netlink::shape", &["root", "ip", "tc"]) {
        return;
    }
    let netns = Netns::new("nl").unwrap();
    let index = within(&netns, || {
        let mut netlink = Netlink::open().unwrap();
        let end = |name| VethEnd { name, mac: None, mtu_bytes: 1500 };
        netlink.create_veth(&end("ve-a"), &end("ve-b"), None).unwrap();
        let index = netlink.link("ve-a").unwrap().index;
        assert_eq!(netlink.shaped(index).unwrap(), None);
        for bytes_per_second in [125_000, 8_000_000_000] {
            let shape = Shape { bytes_per_second, burst_bytes: 4000, queue_bytes: 20_000 };
            netlink.shape(index, &shape).unwrap();
            assert_eq!(netlink.shaped(index).unwrap(), Some(bytes_per_second));
        }
        let shape = Shape { bytes_per_second: 125_000, burst_bytes: 4000, queue_bytes: 20_000 };
        netlink.shape(index, &shape).unwrap();
        index
    });
    assert!(index > 0);
    let shown = netns.command("tc").unwrap().args(["qdisc", "show", "dev", "ve-a"]).output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("tbf 77ef: root") && shown.contains("rate 1Mbit burst 4000b"), "{shown}");
}

#[test]
fn forwarding_ipv6_keeps_what_devices_hear_from_routers() {
    if !require("netlink::forwarding", &["root", "ip", "ipv6"]) {
        return;
    }
    let netns = Netns::new("nl").unwrap();
    within(&netns, || {
        let conf = |name: &str| format!("/proc/sys/net/ipv6/conf/{name}");
        let read = |name: &str| std::fs::read_to_string(conf(name)).unwrap().trim().to_owned();
        Netlink::open().unwrap().ensure_bridge("up-a", 1500).unwrap();
        Netlink::open().unwrap().ensure_bridge("br-a", 1500).unwrap();
        sysctl::refuse_routers("br-a").unwrap();
        sysctl::refuse_routers("not-there").unwrap();
        for _ in 0..2 {
            sysctl::forward_ipv4().unwrap();
            sysctl::forward_ipv6().unwrap();
        }
        assert_eq!(read("all/forwarding"), "1");
        assert_eq!((read("up-a/accept_ra").as_str(), read("br-a/accept_ra").as_str()), ("2", "0"));
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim(), "1");
        assert!(sysctl::use_ipv6("not-there").is_err());
    });
}

#[test]
fn a_namespace_lasts_until_it_is_removed() {
    if !require("netlink::namespace", &["root"]) {
        return;
    }
    let path = PathBuf::from(format!("/run/wt-ns-{}", std::process::id()));
    namespace::create(&path).unwrap();
    let names: Vec<String> = namespace::within(&path, || Netlink::open().unwrap().links().unwrap())
        .unwrap()
        .into_iter()
        .map(|l| l.name)
        .collect();
    assert!(names.contains(&"lo".to_owned()) && !names.contains(&"eth0".to_owned()), "{names:?}");
    namespace::remove(&path).unwrap();
    namespace::remove(&path).unwrap();
    assert!(!path.exists());
}
