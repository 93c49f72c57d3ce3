//! What must become of a connection, by upstream's rules. Pure.
//!
//! - A list holds ready endpoints; if none is ready, those that are terminating and still serve (KEP-1669).
//! - internalTrafficPolicy decides for the cluster address, externalTrafficPolicy for node ports and external addresses: all endpoints,
//!   or those of the node that the packet is on.
//! - What starts in the cluster and meets a node port or an external address on its own node takes any endpoint, whatever
//!   externalTrafficPolicy says: it has passed no load balancer that knows the nodes. To another node's address it comes from outside.
//! - Without any endpoint a connection is refused. With endpoints on other nodes only, policy Local drops it.
//! - The client's address is kept on the cluster address by clients in pods, and under externalTrafficPolicy Local. Elsewhere upstream may
//!   replace it by one of the node's; a proxy that keeps it does better.

use std::collections::BTreeSet;
use std::net::IpAddr;

use weft_tests_conformance::Way;

/// A node of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Node {
    One,
    Two,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Client {
    /// A pod of node one.
    Pod,
    /// A process in the network of a pod of node one that no socket hook serves: its packets must be translated.
    Unhooked,
    /// A pod of node two.
    FarPod,
    /// A pod of node one that is itself an endpoint.
    Endpoint,
    /// A pod of node one in its node's network.
    HostPod,
    /// Node one.
    Node,
    /// Node two.
    FarNode,
    /// A machine that is no node.
    Outside,
}

impl Client {
    pub(crate) const ALL: [Self; 8] = [
        Self::Pod,
        Self::Unhooked,
        Self::FarPod,
        Self::Endpoint,
        Self::HostPod,
        Self::Node,
        Self::FarNode,
        Self::Outside,
    ];

    /// The node it is on.
    pub(crate) fn node(self) -> Option<Node> {
        match self {
            Self::Pod | Self::Unhooked | Self::Endpoint | Self::HostPod | Self::Node => Some(Node::One),
            Self::FarPod | Self::FarNode => Some(Node::Two),
            Self::Outside => None,
        }
    }

    /// Whether it has an address of its own in the pods' network.
    pub(crate) fn is_pod(self) -> bool {
        matches!(self, Self::Pod | Self::Unhooked | Self::FarPod | Self::Endpoint)
    }

    fn is_hooked(self) -> bool {
        !matches!(self, Self::Unhooked | Self::Outside)
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub(crate) fn has(self, address: &IpAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }
}

/// Which address of a Service is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Entry {
    Cluster,
    NodePort(Node),
    /// Routed from outside to node one.
    External,
    /// Of a load balancer; routed as the external one.
    Balancer,
}

impl Entry {
    pub(crate) const ALL: [Self; 5] =
        [Self::Cluster, Self::NodePort(Node::One), Self::NodePort(Node::Two), Self::External, Self::Balancer];
}

/// Which endpoints a Service has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Backends {
    Nobody,
    Near,
    Far,
    Both,
    /// The pod that asks as [`Client::Endpoint`].
    Own,
    /// One that is terminating, on node one.
    Ending,
    /// One that is terminating on node one, and one on node two that isn't.
    EndingAndFar,
}

impl Backends {
    pub(crate) const ALL: [Self; 7] =
        [Self::Nobody, Self::Near, Self::Far, Self::Both, Self::Own, Self::Ending, Self::EndingAndFar];

    /// Name, node, and whether it is ready.
    pub(crate) fn endpoints(self) -> &'static [(&'static str, Node, bool)] {
        match self {
            Self::Nobody => &[],
            Self::Near => &[("near", Node::One, true)],
            Self::Far => &[("far", Node::Two, true)],
            Self::Both => &[("near", Node::One, true), ("far", Node::Two, true)],
            Self::Own => &[("own", Node::One, true)],
            Self::Ending => &[("ending", Node::One, false)],
            Self::EndingAndFar => &[("ending", Node::One, false), ("far", Node::Two, true)],
        }
    }

    /// A list: of one node, or of all.
    fn list(self, only: Option<Node>) -> BTreeSet<&'static str> {
        let of = |is_ready: bool| {
            let eligible = self
                .endpoints()
                .iter()
                .filter(move |(_, node, ready)| *ready == is_ready && only.is_none_or(|only| only == *node));
            eligible.map(|(name, ..)| *name).collect::<BTreeSet<_>>()
        };
        let ready = of(true);
        if ready.is_empty() { of(false) } else { ready }
    }
}

/// A question of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Cell {
    pub(crate) client: Client,
    pub(crate) family: Family,
    pub(crate) entry: Entry,
    /// Both traffic policies are Local.
    pub(crate) local: bool,
    pub(crate) backends: Backends,
    pub(crate) way: Way,
}

/// Which address of the client a server may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The client's own.
    Kept,
    /// The client's own, or one of a node's.
    KeptOrNode,
}

/// What must become of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Answered by one of these.
    By(BTreeSet<&'static str>, Source),
    Refused,
    Dropped,
    /// Upstream drops it; a socket can't be told so, and is refused instead.
    Nothing,
}

impl Cell {
    /// Every question that makes sense.
    pub(crate) fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for (client, family) in pairs(&Client::ALL, &Family::ALL) {
            for (entry, backends) in pairs(&Entry::ALL, &Backends::ALL) {
                for (local, way) in pairs(&[false, true], &Way::ALL) {
                    cells.push(Self { client, family, entry, local, backends, way });
                }
            }
        }
        cells.retain(Self::makes_sense);
        cells
    }

    fn makes_sense(&self) -> bool {
        let reaches = self.client != Client::Outside || self.entry != Entry::Cluster;
        let own = self.client != Client::Endpoint || self.backends == Backends::Own;
        // Packet by packet, both kinds of UDP sockets are the same.
        let way = self.way != Way::SendTo || self.is_hooked();
        reaches && own && way
    }

    /// Whether a socket hook decides.
    fn is_hooked(&self) -> bool {
        self.client.is_hooked() && self.decided_on() == self.client.node()
    }

    /// The node whose proxy decides.
    fn decided_on(&self) -> Option<Node> {
        match self.entry {
            Entry::NodePort(node) => Some(node),
            Entry::Cluster | Entry::External | Entry::Balancer => self.client.node().or(Some(Node::One)),
        }
    }

    /// What must become of it.
    pub(crate) fn expected(&self) -> Expected {
        let only_local = self.local && (self.entry == Entry::Cluster || self.is_from_outside());
        let list = self.backends.list(if only_local { self.decided_on() } else { None });
        if self.backends == Backends::Nobody {
            return Expected::Refused;
        }
        if list.is_empty() {
            return if self.is_hooked() { Expected::Nothing } else { Expected::Dropped };
        }
        Expected::By(list, self.source())
    }

    /// Whether it meets the deciding node from another machine.
    fn is_from_outside(&self) -> bool {
        self.decided_on() != self.client.node()
    }

    /// Which address of the client the server may see.
    fn source(&self) -> Source {
        match self.entry {
            // A packet to oneself must not look like one's own when it comes back.
            Entry::Cluster if self.backends == Backends::Own && self.client.is_pod() => Source::KeptOrNode,
            Entry::Cluster if self.client.is_pod() => Source::Kept,
            // A pod's packet to another node may leave its own node under the node's address.
            _ if self.local && self.is_from_outside() && !self.client.is_pod() => Source::Kept,
            Entry::Cluster | Entry::NodePort(_) | Entry::External | Entry::Balancer => Source::KeptOrNode,
        }
    }
}

fn pairs<A: Copy, B: Copy>(first: &[A], second: &[B]) -> impl Iterator<Item = (A, B)> {
    first.iter().flat_map(|a| second.iter().map(move |b| (*a, *b)))
}
