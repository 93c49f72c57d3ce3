//! Ways to a Service beside the plain ones: affinity over restarts, namespaces within a pod, clients on the node.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::process::Stdio;

use weft_agent_dataplane::abandon::{Search, end_sockets};
use weft_ebpf_abi::{SERVICE_CHECK_SOURCE, SERVICE_DROP_EMPTY};
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::require;

use crate::NEEDS;
use crate::entries::{FAMILIES, Service};
use crate::place::{
    POD, POD6, Place, SOON, ask_datagram, ask_tcp, ask_udp, connected_udp, serve, vip, within,
};

const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

#[test]
fn affinity_outlives_the_agent_for_packets_and_sockets() {
    if !require("dataplane::affinity", &NEEDS) {
        return;
    }
    let place = Place::new("af").unwrap();
    let mut first = place.start().unwrap();
    let mut expected = Vec::new();
    for family in FAMILIES {
        let backends = NAMES.map(|name| serve(&place.pod, family.pod, name));
        let service = Service {
            last: 10,
            node_port: 30080,
            affinity_seconds: 600,
            backends: &backends,
            ..Service::default()
        };
        first.enter(&family, &service).unwrap();
        let plain = Service { last: 11, node_port: 30081, affinity_seconds: 0, ..service };
        first.enter(&family, &plain).unwrap();
        let spread: BTreeSet<_> =
            within(&place.client, || (0..40).map(|_| ask_tcp(family.vip(11)).unwrap()).collect());
        assert!(spread.len() > 1, "without affinity it is always the same");
        for netns in [&place.client, &place.node, &place.pod] {
            for ask in [ask_tcp, ask_udp] {
                let answer = within(netns, || ask(family.vip(10)).unwrap());
                expected.push((netns, ask, family.vip(10), answer));
            }
        }
    }
    let check = || {
        for (netns, ask, to, answer) in &expected {
            within(netns, || (0..10).for_each(|_| assert_eq!(ask(*to).unwrap(), *answer)));
        }
    };
    check();
    drop(first);
    check();
    let _second = place.start().unwrap();
    check();
}

/// A namespace within the pod: its packets come through the pod, which no hook of its own sees.
fn nested(place: &Place) -> Netns {
    let inner = Netns::new("in").unwrap();
    let (p, i) = (place.pod.name(), inner.name());
    let commands = [
        format!("-n {p} link add in0 type veth peer name eth0 netns {i}"),
        format!("-n {p} addr add {POD}/32 dev in0"),
        format!("-n {p} addr add {POD6}/128 dev in0 nodad"),
        format!("-n {p} link set in0 up"),
        format!("-n {i} addr add 10.42.0.77/32 dev eth0"),
        format!("-n {i} addr add fd42::77/128 dev eth0 nodad"),
        format!("-n {i} link set eth0 up"),
        format!("-n {i} route add {POD} dev eth0"),
        format!("-n {i} route add {POD6} dev eth0"),
        format!("-n {i} route add default via {POD}"),
        format!("-n {i} route add default via {POD6}"),
        format!("-n {p} route add 10.42.0.77 dev in0"),
        format!("-n {p} route add fd42::77 dev in0"),
        format!("-n {p} neigh add proxy fd42::77 dev eth0"),
    ];
    for command in &commands {
        ip(&command.split(' ').collect::<Vec<_>>()).unwrap();
    }
    within(&place.pod, || {
        for (file, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv4/conf/eth0/proxy_arp", "1"),
            ("ipv4/neigh/eth0/proxy_delay", "0"),
            ("ipv6/conf/eth0/proxy_ndp", "1"),
            ("ipv6/neigh/eth0/proxy_delay", "0"),
        ] {
            std::fs::write(format!("/proc/sys/net/{file}"), value).unwrap();
        }
    });
    inner
}

#[test]
fn a_namespace_within_a_pod_reaches_services() {
    if !require("dataplane::nested", &NEEDS) {
        return;
    }
    let place = Place::new("ne").unwrap();
    let inner = nested(&place);
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        let pod = serve(&place.pod, family.pod, "pod");
        let host = serve(&place.node, family.node, "host");
        running.plain(&family, 10, 30080, &[pod]).unwrap();
        running.plain(&family, 11, 30081, &[host]).unwrap();
        let address = if family.pod.is_ipv4() { "10.42.0.77" } else { "fd42::77" };
        within(&inner, || {
            for _ in 0..20 {
                assert_eq!(ask_tcp(family.vip(10)).unwrap(), format!("pod {}", family.gateway));
                assert_eq!(ask_udp(family.vip(10)).unwrap(), format!("pod {}", family.gateway));
            }
            assert_eq!(ask_tcp(family.vip(11)).unwrap(), format!("host {address}"));
            assert_eq!(ask_tcp(family.at_node(30080)).unwrap(), format!("pod {}", family.gateway));
        });
    }
}

#[test]
fn flags_hold_for_the_nodes_own_sockets() {
    if !require("dataplane::socket-flags", &NEEDS) {
        return;
    }
    let place = Place::new("sf").unwrap();
    let mut running = place.start().unwrap();
    for family in FAMILIES {
        let pod = serve(&place.pod, family.pod, "pod");
        let service = Service { last: 10, node_port: 30080, backends: &[pod], ..Service::default() };
        running.enter(&family, &Service { flags: SERVICE_CHECK_SOURCE, ..service }).unwrap();
        let ask = || within(&place.node, || ask_tcp(family.vip(10)));
        let before = running.drops("source_not_allowed");
        assert_eq!(ask().unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
        assert_eq!(running.drops("source_not_allowed"), before + 1);
        // What stands for "the node is in a range".
        place.allow(&family, 10, &[(family.vip(10).ip(), 0)]).unwrap();
        assert!(ask().is_ok());
        running.enter(&family, &Service { flags: SERVICE_DROP_EMPTY, backends: &[], ..service }).unwrap();
        let before = running.drops("no_local_endpoints");
        assert_eq!(ask().unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
        assert_eq!(running.drops("no_local_endpoints"), before + 1);
    }
}

/// A process of the pod, in its cgroup and its namespace, with a UDP socket connected to a Service. Prints how it went on when it is
/// told to.
fn pod_process(place: &Place, cgroup: &std::path::Path) -> std::process::Child {
    let program = "import socket,sys\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.settimeout(5)\n\
        s.connect(('10.43.0.10',80))\ns.send(b'?')\nprint(s.recv(64).decode().split()[0],flush=True)\n\
        sys.stdin.readline()\ntry:\n s.send(b'?')\n s.recv(64)\n print('stays',flush=True)\nexcept OSError as e:\n print(e.errno,flush=True)\n\
        s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.settimeout(5)\ns.connect(('10.43.0.10',80))\ns.send(b'?')\n\
        print(s.recv(64).decode().split()[0],flush=True)";
    let script = format!("echo 0 > {}/cgroup.procs && exec python3 -c \"$0\"", cgroup.display());
    let mut command = place.pod.command("sh").unwrap();
    command.args(["-c", &script, program]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

#[test]
fn connected_udp_sockets_leave_a_backend_that_is_gone() {
    if !require("dataplane::udp-left", &[NEEDS.as_slice(), &["python3"]].concat()) {
        return;
    }
    let place = Place::new("ul").unwrap();
    let (first, second) = (serve(&place.pod, POD, "first"), serve(&place.pod, POD, "second"));
    let mut running = place.start().unwrap();
    running.service(10, 30080, &[first]).unwrap();
    assert!(running.reconciler.take_left().is_empty());
    let inner = place.cgroup.join("pod");
    std::fs::create_dir_all(&inner).unwrap();
    let mut process = pod_process(&place, &inner);
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.next().unwrap(), "first");
    let mapped = SocketAddr::from((std::net::Ipv4Addr::new(10, 43, 0, 10).to_ipv6_mapped(), 80));
    let [plain, dual, direct] = within(&place.node, || [vip(10), mapped, first].map(connected_udp));
    for socket in [&plain, &dual, &direct] {
        assert!(ask_datagram(socket).unwrap().starts_with("first"));
    }

    running.service(10, 30080, &[second]).unwrap();
    let left = running.reconciler.take_left();
    assert_eq!(left.len(), 1, "{left:?}");
    let search = Search { node_cgroup: place.cgroup.clone(), pin_dir: place.pins.clone() };
    let report = within(&place.node, || end_sockets(&left, &search)).unwrap();
    assert_eq!((report.namespaces, report.ended), (2, 3));
    for socket in [&plain, &dual] {
        // What a process gets that waits for an answer, and one that sends.
        let waiting = socket.take_error().unwrap().unwrap();
        assert_eq!(waiting.kind(), std::io::ErrorKind::ConnectionAborted);
        let sending = ask_datagram(socket).unwrap_err().raw_os_error();
        assert_eq!(sending, Some(nix::libc::EDESTADDRREQ));
    }
    assert!(ask_datagram(&direct).unwrap().starts_with("first"), "it asked for the pod, not for the Service");
    within(&place.node, || assert!(ask_udp(vip(10)).unwrap().starts_with("second")));
    drop(process.stdin.take());
    let ended = nix::libc::EDESTADDRREQ.to_string();
    assert_eq!(lines.by_ref().take(2).collect::<Vec<_>>(), [ended, "second".to_owned()]);
    process.wait().unwrap();
    std::fs::remove_dir(&inner).unwrap();
    let again = within(&place.node, || end_sockets(&left, &search)).unwrap();
    assert_eq!((again.namespaces, again.ended), (1, 0));
}

/// A namespace that stands for the pods of another node, behind a device that stands for the overlay.
fn other_node(place: &Place) -> Netns {
    let far = Netns::new("on").unwrap();
    let (n, f) = (place.node.name(), far.name());
    let commands = [
        format!("-n {n} link add weft.vx type veth peer name eth0 netns {f}"),
        format!("-n {n} addr add 10.42.1.1/24 dev weft.vx"),
        format!("-n {n} addr add fd42:0:0:1::1/64 dev weft.vx nodad"),
        format!("-n {n} link set weft.vx up"),
        format!("-n {f} addr add 10.42.1.2/24 dev eth0"),
        format!("-n {f} addr add fd42:0:0:1::2/64 dev eth0 nodad"),
        format!("-n {f} link set eth0 up"),
        format!("-n {f} route add default via 10.42.1.1"),
        format!("-n {f} route add default via fd42:0:0:1::1"),
    ];
    for command in &commands {
        ip(&command.split(' ').collect::<Vec<_>>()).unwrap();
    }
    far
}

#[test]
fn a_pod_keeps_its_address_towards_pods_of_other_nodes() {
    if !require("dataplane::kept", &NEEDS) {
        return;
    }
    let place = Place::new("kp").unwrap();
    let far = other_node(&place);
    let mut running = place.start().unwrap();
    for (family, there) in FAMILIES.into_iter().zip(["10.42.1.2", "fd42:0:0:1::2"]) {
        let there: std::net::IpAddr = there.parse().unwrap();
        let backend = serve(&far, there, "far");
        let outside = serve(&place.client, family.client, "outside");
        for last in [10, 11] {
            running.plain(&family, last, 30_070 + u16::from(last), &[backend]).unwrap();
        }
        running.plain(&family, 12, 30082, &[outside]).unwrap();
        let from_pod = format!("far {}", family.pod);
        within(&place.pod, || {
            assert_eq!(ask_tcp(family.vip(10)).unwrap(), from_pod);
            assert_eq!(ask_udp(family.vip(10)).unwrap(), from_pod);
            // One port, two Services, one backend: the answers are told apart by another port for the second.
            let socket = UdpSocket::bind((family.pod, 0)).unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            for last in [10, 11, 10, 11] {
                socket.send_to(b"?", family.vip(last)).unwrap();
                let mut buffer = [0; 64];
                let (count, from) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..count], from), (from_pod.as_bytes(), family.vip(last)));
            }
            let uplink = format!("outside {}", family.node);
            assert_eq!(ask_tcp(family.vip(12)).unwrap(), uplink, "who is no pod could not answer a pod");
        });
        within(&place.client, || assert!(ask_tcp(family.vip(10)).is_ok(), "from outside"));
        within(&far, || {
            // A pod of another node asks this one, by a Service that leads to a pod here.
            let pod = serve(&place.pod, family.pod, "pod");
            running.plain(&family, 13, 30083, &[pod]).unwrap();
            assert_eq!(ask_tcp(family.vip(13)).unwrap(), format!("pod {there}"));
        });
    }
}
