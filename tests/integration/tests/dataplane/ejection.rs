//! Backends whose connections fail: what the kernel counts, and that they take no connections until they are tried again.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane::ejection::{Ejections, FIRST_SECONDS, Turn};
use weft_agent_dataplane::node;
use weft_agent_dataplane::observe::Observer;
use weft_agent_dataplane::observe::wire::{Answer, Request};
use weft_agent_dataplane::{cleanup, run};
use weft_ebpf_abi::{BackendKey, FAILED, FAILURES_IN_A_ROW, Port, TCP};
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::{require, wait_until};

use crate::NEEDS;
use crate::agent::{self, Api};
use crate::counts::counted;
use crate::entries::{FAMILIES, Family, V4};
use crate::place::{POD, POD6, Place, Running, SOON, serve, within};

/// Second addresses of the pod, at which nobody listens.
const REFUSING: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 42, 0, 3)), IpAddr::V6(Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, 3))];
/// Nobody has these.
const DUMB: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 42, 0, 9)), IpAddr::V6(Ipv6Addr::new(0xfd42, 0, 0, 0, 0, 0, 0, 9))];
const NODE_PORT: u16 = 30_044;
/// So many connections reach both of two backends, but for one chance in 10^18.
const MANY: u32 = 60;
/// As long as a client needs to send a SYN a second time, whatever else its machine does.
const ASKS_AGAIN: Duration = Duration::from_secs(6);
const PATIENCE: Duration = Duration::from_secs(30);

/// The dataplane with its agent's part in ejection, whose clock the test moves.
struct Watching {
    running: Running,
    ejections: Ejections,
    _runtime: tokio::runtime::Runtime,
}

impl Watching {
    fn start(place: &Place, now: u32) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut running = place.start().unwrap();
        let ejections = {
            let _within = runtime.enter();
            Ejections::adopt(&running.programs, now).unwrap()
        };
        running.reconciler.tables.set_ejected(ejections.ejected());
        Self { running, ejections, _runtime: runtime }
    }

    /// Enters a Service with these endpoints, all at the port of the first.
    fn publish(&mut self, last: u8, endpoints: &[IpAddr], port: u16, annotation: &str) {
        let is_v6 = endpoints[0].is_ipv6();
        let family = &FAMILIES[usize::from(is_v6)];
        let (name, address_type) = (format!("s{last}"), if is_v6 { "IPv6" } else { "IPv4" });
        self.running
            .apply(json!({"metadata": {"namespace": "default", "name": name, "annotations": {"weft.dev/ejection": annotation}},
                "spec": {"type": "NodePort", "clusterIP": family.vip(last).ip(), "ipFamilies": [address_type],
                    "ports": [{"port": 80, "nodePort": NODE_PORT, "protocol": "TCP"}]}}))
            .unwrap();
        let endpoints: Vec<_> = endpoints.iter().map(|ip| json!({"addresses": [ip]})).collect();
        self.running
            .apply(json!({"addressType": address_type, "endpoints": endpoints, "ports": [{"name": "", "port": port, "protocol": "TCP"}],
                "metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": name}}}))
            .unwrap();
        if let Some(wanted) = self.running.reconciler.take_watched() {
            self.ejections.watch(&wanted);
            let cgroup2 = node::cgroup2_mount().unwrap();
            self.running.programs.watch_sockets(&cgroup2, self.ejections.is_watching()).unwrap();
        }
    }

    /// Does at this second what the agent does when it is woken.
    fn take(&mut self, now: u32) -> Vec<Turn> {
        let turns = self.ejections.take(now);
        let changed = self.running.reconciler.tables.set_ejected(self.ejections.ejected());
        self.running.reconciler.mark(changed);
        self.running.sync().unwrap();
        turns
    }
}

fn place(label: &str) -> (Place, u16) {
    let place = Place::new(label).unwrap();
    let port = serve(&place.pod, POD, "pod").port();
    let v6 = within(&place.pod, || TcpListener::bind((POD6, port)).unwrap());
    // Who takes connections takes them, and has nothing to say.
    std::thread::spawn(move || v6.incoming().for_each(drop));
    for (refusing, length) in REFUSING.into_iter().zip(["24", "64"]) {
        ip(&["-n", place.pod.name(), "addr", "add", &format!("{refusing}/{length}"), "dev", "eth0"]).unwrap();
    }
    (place, port)
}

fn key(address: IpAddr, port: u16) -> BackendKey {
    BackendKey { address: address.into(), port: Port::new(port), protocol: TCP, pad: 0 }
}

fn ejected(address: IpAddr, port: u16, seconds: u32) -> Turn {
    Turn { backend: key(address, port), seconds: Some(seconds) }
}

fn back(address: IpAddr, port: u16) -> Turn {
    Turn { backend: key(address, port), seconds: None }
}

/// Connects from a namespace until so many connections were refused; others must succeed.
fn refused(from: &Netns, to: SocketAddr, count: u32) {
    let mut refused = 0;
    within(from, || {
        for _ in 0..count * MANY {
            match TcpStream::connect_timeout(&to, SOON) {
                Ok(_) => {}
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
                    refused += 1;
                }
            }
            if refused == count {
                return;
            }
        }
        panic!("{refused} of {count} connections were refused");
    });
}

fn all_succeed(from: &Netns, to: SocketAddr) {
    within(from, || {
        for n in 0..MANY {
            TcpStream::connect_timeout(&to, SOON).unwrap_or_else(|error| panic!("connection {n}: {error}"));
        }
    });
}

/// Ways to the Service of a family: a socket of the node's, and packets of a client outside.
fn ways<'a>(place: &'a Place, family: &Family) -> [(&'a Netns, SocketAddr); 2] {
    [(&place.node, family.vip(44)), (&place.client, family.at_node(NODE_PORT))]
}

/// Both ways in each family, with the family's pod, the address that refuses and the one that nobody has.
fn all_ways(place: &Place) -> impl Iterator<Item = (&Netns, SocketAddr, [IpAddr; 3])> {
    FAMILIES.into_iter().zip(REFUSING).zip(DUMB).flat_map(|((family, refusing), dumb)| {
        ways(place, &family).map(|(from, to)| (from, to, [family.pod, refusing, dumb]))
    })
}

#[test]
fn a_backend_that_refuses_is_left_out_and_tried_again() {
    if !require("dataplane::ejection-refused", &NEEDS) {
        return;
    }
    let (place, port) = place("ej");
    for (from, to, [pod, refusing, _]) in all_ways(&place) {
        let mut node = Watching::start(&place, 1_000);
        // Fewer do nothing, nor do those of a Service that has not asked for it.
        node.publish(44, &[pod, refusing], port, "false");
        refused(from, to, FAILURES_IN_A_ROW + 1);
        assert_eq!(node.take(1_000), []);
        node.publish(44, &[pod, refusing], port, "true");
        refused(from, to, FAILURES_IN_A_ROW - 1);
        assert_eq!(node.take(1_000), [], "{to}");
        let failed = counted(&node.running, "s44").remove(&FAILED);
        assert_eq!(failed, Some(u64::from(FAILURES_IN_A_ROW - 1)), "{to}: also counted of its Service");
        refused(from, to, 1);
        assert_eq!(node.take(1_000), [ejected(refusing, port, FIRST_SECONDS)], "{to}");
        all_succeed(from, to);
        assert_eq!(node.take(1_000 + FIRST_SECONDS - 1), []);

        // It comes back on trial: one failure is enough.
        assert_eq!(node.take(1_000 + FIRST_SECONDS), [back(refusing, port)], "{to}");
        refused(from, to, 1);
        assert_eq!(node.take(1_030), [ejected(refusing, port, 2 * FIRST_SECONDS)], "{to}");
        all_succeed(from, to);

        // It serves again: one success, and it has its whole credit.
        assert_eq!(node.take(1_090), [back(refusing, port)]);
        let listener = within(&place.pod, || TcpListener::bind((refusing, port)).unwrap());
        all_succeed(from, to);
        drop(listener);
        refused(from, to, FAILURES_IN_A_ROW - 1);
        assert_eq!(node.take(1_091), [], "{to}");
        refused(from, to, 1);
        assert_eq!(node.take(1_091), [ejected(refusing, port, FIRST_SECONDS)], "{to}");
        // Whoever opts out has nothing left of it.
        node.publish(44, &[pod, refusing], port, "false");
        assert!(node.ejections.ejected().is_empty());
    }
}

#[test]
fn a_backend_that_does_not_answer_is_left_out() {
    if !require("dataplane::ejection-unanswered", &NEEDS) {
        return;
    }
    let (place, port) = place("eu");
    for (from, to, [pod, _, dumb]) in all_ways(&place) {
        let mut node = Watching::start(&place, 1_000);
        node.publish(44, &[pod, dumb], port, "true");
        // Who gives up says nothing of the backend.
        within(from, || {
            for _ in 0..MANY {
                let _ = TcpStream::connect_timeout(&to, Duration::from_millis(1));
            }
        });
        // Flows translated by packets go on asking if nobody ends them; a socket that is closed does not.
        assert_eq!(node.take(1_000), [], "{to}");
        let mut turns = Vec::new();
        std::thread::scope(|scope| {
            for _ in 0..MANY / 2 {
                scope.spawn(|| within(from, || TcpStream::connect_timeout(&to, ASKS_AGAIN)));
            }
            wait_until("the ejection", PATIENCE, || {
                turns.extend(node.take(1_000));
                Ok((!turns.is_empty()).then_some(()))
            })
            .unwrap();
        });
        assert_eq!(turns, [ejected(dumb, port, FIRST_SECONDS)], "{to}");
        all_succeed(from, to);
        node.publish(44, &[pod, dumb], port, "false");
    }
}

#[test]
fn what_is_ejected_stays_out_without_an_agent_and_with_the_next() {
    if !require("dataplane::ejection-restart", &NEEDS) {
        return;
    }
    let (place, port) = place("er");
    let (pod, refusing) = (V4.pod, REFUSING[0]);
    let (from, to) = ways(&place, &V4)[0];
    let mut node = Watching::start(&place, 1_000);
    node.publish(44, &[pod, refusing], port, "true");
    drop(node);
    // They fail while nobody is there to hear of it.
    refused(from, to, FAILURES_IN_A_ROW);
    let mut node = Watching::start(&place, 1_000);
    node.publish(44, &[pod, refusing], port, "true");
    assert_eq!(node.take(1_000), [ejected(refusing, port, FIRST_SECONDS)]);
    drop(node);
    all_succeed(from, to);
    let observer = Observer { pins: place.pins.clone(), netns: None, cgroup: place.cgroup.clone() };
    let Answer::Ejected(seen) = observer.answer(&Request::Ejected).unwrap() else { panic!("another answer") };
    assert_eq!(seen.iter().map(|one| BackendKey::from(one.key)).collect::<Vec<_>>(), [key(refusing, port)]);

    let mut node = Watching::start(&place, 1_010);
    node.publish(44, &[pod, refusing], port, "true");
    assert_eq!(node.take(1_010), []);
    all_succeed(from, to);
    assert_eq!(node.take(1_030), [back(refusing, port)]);
    refused(from, to, 1);
}

#[test]
fn sockets_are_watched_as_soon_as_they_can_be() {
    if !require("dataplane::ejection-retry", &NEEDS) {
        return;
    }
    let (place, port) = place("et");
    // Where the program's pin would be is something else.
    let pin = place.pins.join("links").join("weft_sockops");
    std::fs::create_dir_all(&pin).unwrap();
    let api = Api::default();
    let mut service = agent::service();
    service["metadata"]["annotations"] = json!({"weft.dev/ejection": "true"});
    api.list("services", vec![service]);
    api.list("endpointslices", vec![agent::slice(&[SocketAddr::new(V4.pod, port)], "6")]);
    let config = agent::config(&place);
    within(&place.node, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let shutdown = CancellationToken::new();
            let (programmed, mut is_programmed) = watch::channel(false);
            let running = tokio::spawn(run(config.clone(), api.client(), programmed, shutdown.clone()));
            tokio::time::timeout(PATIENCE, is_programmed.wait_for(|is| *is)).await.unwrap().unwrap();
            assert!(pin.is_dir(), "Services don't wait for it");
            std::fs::remove_dir(&pin).unwrap();
            agent::eventually("a program that watches sockets", || pin.is_file()).await;
            shutdown.cancel();
            tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap().unwrap();
        });
        runtime.block_on(cleanup(&config)).unwrap();
    });
}
