//! What the rest of the node is told: of the ways to other nodes, and what there is to be tried on them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use weft_cni_netlink::Route;
use weft_ebpf_abi::{Address, NODE_DIRECT, NODE_NEAR, NodeConfig, Tunnel};

use super::offload::{Card, Finisher, Witness, Witnesses};
use super::trial::Trials;
use super::ways::Range;
use super::width::{First, Ways, Widths};
use super::{Overlay, Peer, Routing, peer};
use crate::peers::echo::Question;

impl Overlay {
    /// Enters into what the programs are told what the ways to peers are like.
    #[must_use]
    pub fn describe(&self, node: NodeConfig) -> NodeConfig {
        let narrowest = self.narrow.values().copied().min().unwrap_or(0);
        let near = self.applied.values().flat_map(|entries| &entries.ranges).any(|r| r.native().is_some());
        NodeConfig {
            narrowest_bytes: u16::try_from(narrowest).unwrap_or(u16::MAX),
            flags: node.flags & NODE_DIRECT | if near { NODE_NEAR } else { 0 },
            ..node
        }
    }

    /// The ranges that are reached past the tunnel, with the device of the link.
    #[must_use]
    pub fn near(&self) -> BTreeMap<IpNetwork, u32> {
        let ranges = self.applied.values().flat_map(|entries| &entries.ranges);
        ranges.filter_map(|range| Some((range.first.destination, range.native()?))).collect()
    }

    /// The addresses of the other nodes and of their pods, with the largest packet that gets to these pods by the tunnel if their node
    /// answers clients outside by itself; 0 for all others.
    #[must_use]
    pub fn direct(&self) -> BTreeMap<IpNetwork, u32> {
        let others = self.nodes.iter().filter(|(name, _)| **name != self.node_name).map(|(_, peer)| peer);
        let mut known = BTreeMap::new();
        for peer in others {
            known.extend(peer.addresses.iter().map(|address| (IpNetwork::from(*address), 0)));
            known.extend(peer.pods.iter().map(|range| (*range, 0)));
        }
        for (peer, entries) in self.applied.iter().filter(|(peer, _)| peer.direct) {
            let takes = entries.narrow_bytes.unwrap_or(u32::MAX).min(self.mtu_bytes);
            let by_tunnel = entries.ranges.iter().filter(|range| range.native().is_none());
            let ranges = by_tunnel.map(|range| range.first.destination).filter(|r| peer.pods.contains(r));
            known.extend(ranges.map(|range| (range, takes)));
        }
        known
    }

    /// The ends of the tunnels to peers that should be reachable.
    #[must_use]
    pub fn tunnels(&self) -> Vec<Tunnel> {
        let own = Address::from(self.node_ip);
        let peers = self.wanted();
        peers.iter().map(|peer| Tunnel { own, peer: Address::from(peer.address) }).collect()
    }

    /// What has to be tried: whether packets from pods to those of each of these ranges get there by the link.
    #[must_use]
    pub fn trials(&self) -> Trials {
        let ranges = self.applied.values().flat_map(|entries| &entries.ranges);
        let of = |range: &Range| {
            let (destination, hop) = (range.first.destination, range.hop?);
            let question = Question {
                to: peer::first(destination),
                from: range.first.source?,
                device: hop.index,
                packet_bytes: usize::try_from(hop.takes_bytes()).unwrap_or(usize::MAX),
            };
            Some((destination, question))
        };
        if self.routing == Routing::Auto { ranges.filter_map(of).collect() } else { Trials::new() }
    }

    /// What has to be measured: the ways to other nodes.
    #[must_use]
    pub fn ways(&self) -> Ways {
        let firsts = self.applied.values().flat_map(|entries| &entries.firsts);
        let believed = |to: &IpAddr| self.adopted.as_ref().and_then(|adopted| adopted.get(to).copied());
        firsts.map(|(to, first)| (*to, First { believed_bytes: believed(to), ..*first })).collect()
    }

    /// Who can tell whether the card finishes checksums within tunnels: the bridges of nodes that a tunnel leads to.
    #[must_use]
    pub fn witnesses(&self) -> Witnesses {
        let ranges = self.applied.values().flat_map(|entries| {
            let by_tunnel = entries.ranges.iter().filter(|range| range.native().is_none());
            by_tunnel.map(|range| (entries.underlay, range.first))
        });
        let witness = |(link, route): (u32, Route)| {
            let card = Card { overlay: self.index, link };
            let finished_before = self.finisher.1 != Finisher::Card;
            Some((peer::first(route.destination), Witness { from: route.source?, card, finished_before }))
        };
        ranges.filter(|(link, _)| *link != 0).filter_map(witness).collect()
    }

    /// Whether the card finishes checksums within tunnels.
    pub(crate) fn leaves_checksums(&self) -> bool {
        self.finisher.1 == Finisher::Card
    }

    /// What the ways take that are narrower than they begin.
    pub(crate) fn found(&self) -> &Widths {
        &self.found
    }

    /// The Node that has an address, itself or for its pods.
    pub(crate) fn name_of(&self, address: IpAddr) -> Option<&str> {
        let mut nodes = self.nodes.iter();
        let has = |peer: &Peer| {
            peer.routers.contains(&address) || peer.pods.iter().any(|range| range.contains(address))
        };
        nodes.find(|(_, peer)| has(peer)).map(|(name, _)| name.as_str())
    }
}
