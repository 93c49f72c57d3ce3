//! Cards that break checksums within tunnels: found out and done without; others are not accused.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane::overlay::Overlay;
use weft_agent_dataplane::overlay::offload::exam::{Verdict, examine};
use weft_agent_dataplane::overlay::offload::{self, Broken, Witnesses};
use weft_cni_netlink::Offloads;
use weft_tests_harness::netns::Netns;
use weft_tests_harness::require;

use crate::card::{Card, Cards};
use crate::links::run;
use crate::overlay::{overlay, repair, two_nodes_joined};
use crate::place::{ask_tcp, ask_udp, serve, within};

/// A bound against waiting for ever: it takes five seconds to be sure.
const PATIENCE: Duration = Duration::from_secs(60);
const UNDERLAY: &str = "192.168.79.";
const BOTH: [(&str, u8); 2] = [("node-1", 1), ("node-2", 2)];

/// Addresses of a node's bridge, and of its pod.
fn bridge(number: u8) -> [IpAddr; 2] {
    [format!("10.42.{number}.1"), format!("fd42:0:0:{number}::1")].map(|ip| ip.parse().unwrap())
}

pub(crate) fn pod(number: u8) -> [IpAddr; 2] {
    [format!("10.42.{number}.2"), format!("fd42:0:0:{number}::2")].map(|ip| ip.parse().unwrap())
}

/// Two nodes with their overlays, the first one's card as it is told and the second one's sound; with their pods.
pub(crate) fn nodes(card: Card) -> (Cards, Vec<Netns>, Vec<Netns>, [Overlay; 2]) {
    let mut cards = None;
    let (netns, pods) = two_nodes_joined(|nodes| cards = Some(Cards::join(nodes, [card, Card::Right])));
    let overlays = [1, 2].map(|number| overlay(number, (&netns[usize::from(number) - 1], UNDERLAY), &BOTH));
    (cards.unwrap(), netns, pods, overlays)
}

fn verdict(from: &Netns, own: IpAddr, to: IpAddr) -> Verdict {
    within(from, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(PATIENCE, examine(own, to)).await.unwrap() })
    })
}

/// The self test of a node.
struct Test {
    witnesses: watch::Sender<Witnesses>,
    broken: watch::Receiver<Option<Broken>>,
    runtime: tokio::runtime::Runtime,
}

impl Test {
    fn start(node: &Netns, witnesses: Witnesses) -> Self {
        // Its thread stays in the namespace that it was made in.
        let runtime = within(node, || {
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
        });
        let ((witnesses, to_ask), (find, broken)) = (watch::channel(witnesses), watch::channel(None));
        runtime.spawn(offload::run(to_ask, find, CancellationToken::new()));
        Self { witnesses, broken, runtime }
    }

    fn wait(&mut self, wanted: impl Fn(&Option<Broken>) -> bool) -> Option<Broken> {
        let broken = &mut self.broken;
        let seen = self.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, broken.wait_for(wanted)).await.ok().map(|seen| *seen.unwrap())
        });
        seen.unwrap_or_else(|| panic!("{:?}", *self.broken.borrow()))
    }
}

pub(crate) fn finishes(node: &Netns) -> bool {
    within(node, || Offloads::open().unwrap().finishes_checksums("weft.vx")).unwrap()
}

pub(crate) fn get_through(from: &Netns, servers: [SocketAddr; 2]) -> [bool; 4] {
    let [v4, v6] = servers;
    within(from, || [ask_udp(v4).is_ok(), ask_udp(v6).is_ok(), ask_tcp(v4).is_ok(), ask_tcp(v6).is_ok()])
}

#[test]
fn a_broken_card_is_found_out_and_done_without() {
    if !require("dataplane::offload-broken", &["root", "ip"]) {
        return;
    }
    let (cards, netns, pods, [mut first, _second]) = nodes(Card::Broken);
    let servers = pod(2).map(|ip| serve(&pods[1], ip, "far"));
    assert_eq!(get_through(&pods[0], servers), [false; 4]);
    assert!(cards.left(1) > 0, "sockets leave their checksums to the card");
    for (own, to) in bridge(1).into_iter().zip(bridge(2)) {
        assert_eq!(verdict(&netns[0], own, to), Verdict::Broken, "{to}");
        assert_eq!(verdict(&netns[1], to, own), Verdict::Sound, "the other node's card: {own}");
    }

    assert_eq!(first.witnesses().keys().copied().collect::<Vec<_>>(), bridge(2));
    let mut test = Test::start(&netns[0], first.witnesses());
    let mut devices = Vec::new();
    for remade in [false, true] {
        if remade {
            let delete = format!("-n {} link del weft.vx", netns[0].name());
            repair(&mut first, &netns[0], &delete, || run(&delete));
            assert!(finishes(&netns[0]), "a new device begins with a clean slate");
            test.witnesses.send_replace(first.witnesses());
        }
        assert_eq!(get_through(&pods[0], servers), [false; 4], "made anew: {remade}");
        let card = first.witnesses()[&bridge(2)[0]].card;
        let broken = test.wait(|broken| broken.is_some_and(|broken| broken.card == card));
        first.set_broken(broken);
        within(&netns[0], || first.sync()).unwrap();
        assert!(!first.is_dirty() && !finishes(&netns[0]));
        let before = cards.left(1);
        assert_eq!(get_through(&pods[0], servers), [true; 4], "made anew: {remade}");
        assert_eq!(cards.left(1), before, "nothing is left to the card");
        // A device that was only down is the one that it was.
        let down = format!("-n {} link set weft.vx down", netns[0].name());
        repair(&mut first, &netns[0], &down, || run(&down));
        assert!(!finishes(&netns[0]));
        test.witnesses.send_replace(first.witnesses());
        devices.push(card.overlay);
    }
    assert_ne!(devices[0], devices[1]);

    // The next agent finds nothing wrong, and leaves it as it is.
    let mut next = overlay(1, (&netns[0], UNDERLAY), &BOTH);
    assert!(next.witnesses().values().all(|witness| witness.finished_before) && !finishes(&netns[0]));
    next.set_broken(None);
    within(&netns[0], || next.sync()).unwrap();
    assert!(!finishes(&netns[0]));
    // Nobody goes by the card any more: it is no longer judged.
    test.witnesses.send_replace(Witnesses::new());
    first.set_broken(test.wait(Option::is_none));
    within(&netns[0], || first.sync()).unwrap();
    assert!(finishes(&netns[0]));
}

#[test]
fn sound_cards_and_poor_networks_are_not_accused() {
    if !require("dataplane::offload-sound", &["root", "ip"]) {
        return;
    }
    for card in [Card::Right, Card::Lossy] {
        let (cards, netns, pods, [first, _second]) = nodes(card);
        for (own, to) in bridge(1).into_iter().zip(bridge(2)) {
            assert_eq!(verdict(&netns[0], own, to), Verdict::Sound, "{card:?}: {to}");
        }
        assert!(cards.left(1) >= 2, "what was asked with was left to the card");
        let nobody = ["10.42.2.77", "fd42:0:0:2::77"].map(|ip| ip.parse().unwrap());
        for (own, to) in bridge(1).into_iter().zip(nobody) {
            assert_eq!(verdict(&netns[0], own, to), Verdict::Unknown, "{card:?}: {to}");
        }
        assert!(first.witnesses().values().all(|witness| !witness.finished_before));
        if card == Card::Right {
            let servers = pod(2).map(|ip| serve(&pods[1], ip, "far"));
            assert_eq!(get_through(&pods[0], servers), [true; 4]);
        }
    }
}
