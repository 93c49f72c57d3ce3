//! Ways to other nodes that are narrower than their first link: found, followed, and told to pods.

use std::io::Write as _;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane::overlay::width::{self, First, Ways, Widths};
use weft_agent_dataplane::overlay::{Overlay, Routing};
use weft_cni_netlink::Netlink;
use weft_tests_harness::netns::Netns;
use weft_tests_harness::require;

use crate::links::{Links, Number, address, pod, run};
use crate::overlay::repair;
use crate::place::within;

/// A bound against waiting for ever: a search takes ten seconds, more where both processors are taken.
const PATIENCE: Duration = Duration::from_secs(60);
/// More than fits in the buffers of a connection that gets nothing through.
const BODY_BYTES: usize = 8 << 20;
/// The narrow link behind the router. Towards it a pair of devices takes four bytes more, a VLAN's, and says nothing of what it drops.
const NARROW: u32 = 1_400;
const NARROW_UNSAID: u32 = 1_404;
const TUNNEL_BYTES: u32 = 50;

/// The measuring of a node's ways.
struct Measuring {
    ways: watch::Sender<Ways>,
    found: watch::Receiver<Widths>,
    runtime: tokio::runtime::Runtime,
}

impl Measuring {
    fn start(node: &Netns, ways: Ways) -> Self {
        // Its thread stays in the namespace that it was made in.
        let runtime = within(node, || {
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
        });
        let ((ways, to_measure), (find, found)) = (watch::channel(ways), watch::channel(Widths::new()));
        runtime.spawn(width::run(to_measure, find, CancellationToken::new()));
        Self { ways, found, runtime }
    }

    fn wait(&mut self, wanted: &Widths) {
        let found = &mut self.found;
        let seen = self.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, found.wait_for(|found| found == wanted)).await.is_ok()
        });
        assert!(seen, "{:?} not {wanted:?}", *self.found.borrow());
    }
}

/// The routes' MTU from a node to the pods of another.
fn mtu(from: &Netns, to: Number) -> [Option<u32>; 2] {
    within(from, || {
        let mut netlink = Netlink::open().unwrap();
        pod(to).map(|address| netlink.route_to(address).unwrap().unwrap().mtu_bytes)
    })
}

fn bodies_get_through(from: &Netns, to: &Netns, addresses: [IpAddr; 2]) {
    for address in addresses {
        let listener = within(to, || TcpListener::bind((address, 0)).unwrap());
        let at = listener.local_addr().unwrap();
        let received = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            std::io::copy(&mut stream, &mut std::io::sink()).unwrap()
        });
        within(from, || {
            let mut stream = TcpStream::connect_timeout(&at, PATIENCE).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            stream.write_all(&[7; BODY_BYTES]).unwrap();
        });
        assert_eq!(received.join().unwrap(), u64::try_from(BODY_BYTES).unwrap(), "{address}");
    }
}

fn narrow(links: &Links, bytes: u32) {
    run(&format!("-n {} link set r1 mtu {bytes}", links.router.name()));
}

fn adopt(overlay: &mut Overlay, node: &Netns, found: Widths) {
    overlay.set_found(found);
    within(node, || overlay.sync()).unwrap();
}

#[test]
fn a_way_that_is_narrow_behind_a_router_is_found_and_told_to_pods() {
    if !require("dataplane::width", &["root", "ip"]) {
        return;
    }
    let links = Links::new();
    let [mut first, _, mut third] = [1, 2, 3].map(|number| links.overlay(number, Routing::Tunnel));
    narrow(&links, NARROW);
    assert_eq!(first.ways().len(), 2, "one to each other node: {:?}", first.ways());
    // From here the router says so, from there nobody does.
    let there = Widths::from([(address(3)[0], NARROW)]);
    let back = Widths::from([(address(1)[0], NARROW_UNSAID), (address(2)[0], NARROW_UNSAID)]);
    let mut measuring = Measuring::start(links.node(1), first.ways());
    measuring.wait(&there);
    Measuring::start(links.node(3), third.ways()).wait(&back);

    adopt(&mut first, links.node(1), there);
    adopt(&mut third, links.node(3), back);
    assert_eq!(mtu(links.node(1), 3), [Some(NARROW - TUNNEL_BYTES); 2]);
    assert_eq!(mtu(links.node(1), 2), [None; 2], "the way to others stays as wide as it is");
    assert_eq!(mtu(links.node(3), 1), [Some(NARROW_UNSAID - TUNNEL_BYTES); 2]);
    assert!(!first.is_dirty() && !third.is_dirty());
    bodies_get_through(links.pod(1), links.pod(3), pod(3));
    bodies_get_through(links.pod(3), links.pod(1), pod(1));
    for (address, within_bytes) in pod(3).into_iter().zip([NARROW - TUNNEL_BYTES; 2]) {
        let learned = within(links.pod(1), || Netlink::open().unwrap().route_to(address)).unwrap().unwrap();
        assert_eq!(
            (learned.mtu_bytes, learned.learned),
            (Some(within_bytes), true),
            "the pod was told: {address}"
        );
    }

    // The next agent goes on with it.
    let next = links.overlay(1, Routing::Tunnel);
    assert_eq!((mtu(links.node(1), 3), mtu(links.node(1), 2)), ([Some(NARROW - TUNNEL_BYTES); 2], [None; 2]));
    let believed = [3, 2].map(|other| next.ways()[&address(other)[0]].believed_bytes);
    assert_eq!(believed, [Some(NARROW), None]);

    // Wide again, and as wide as the first link, whatever that takes.
    narrow(&links, 1_500);
    for (link, tunnel) in [(1_450, Some(1_400)), (1_500, None)] {
        let change = format!("-n {} link set up0 mtu {link}", links.node(1).name());
        repair(&mut first, links.node(1), &change, || run(&change));
        measuring.ways.send_replace(first.ways());
        measuring.wait(&Widths::new());
        adopt(&mut first, links.node(1), Widths::new());
        assert_eq!(mtu(links.node(1), 3), [tunnel; 2]);
    }
}

#[test]
fn a_way_of_ipv6_is_measured_alike_and_nobody_there_is_no_narrow_way() {
    if !require("dataplane::width-ipv6", &["root", "ip"]) {
        return;
    }
    let links = Links::new();
    narrow(&links, NARROW);
    let way = First { device: 1, gateway: None, takes_bytes: 1_500, believed_bytes: None };
    let nobody: [IpAddr; 2] = ["192.168.80.77", "fd80::77"].map(|ip| ip.parse().unwrap());
    let both = address(2).into_iter().chain(address(3));
    let ways = both.chain(nobody).map(|to| (to, way)).collect();
    Measuring::start(links.node(1), ways).wait(&address(3).map(|to| (to, NARROW)).into());
    let both: Vec<IpAddr> = address(1).into_iter().chain(address(2)).collect();
    let ways = both.iter().copied().chain(nobody).map(|to| (to, way)).collect();
    let all = both.into_iter().map(|to| (to, NARROW_UNSAID)).collect();
    Measuring::start(links.node(3), ways).wait(&all);
}
