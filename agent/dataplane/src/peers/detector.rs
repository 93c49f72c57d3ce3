//! Who is believed dead, from the answers that one node gets. Pure: time and answers come in, actions go out.
//!
//! ```text
//! Unheard ── answers ──► Well ── no answer ──► Doubted ── no answer, while others answer ──► Silent
//!                          ▲                      │                                            │
//!                          └────── answers ───────┴────────────── answers again and again ─────┘
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A peer that is watched is asked this often.
const CALM: Duration = Duration::from_millis(250);
/// A doubted one is asked this often, and an answer has this long before its lack is counted (it is taken later too).
const HURRY: Duration = Duration::from_millis(100);
/// Questions without an answer after which others are told to look.
const TELL_AFTER: u32 = 3;
/// Questions without an answer after which a peer is believed dead. With the interval before the first of them, a
/// node's death is seen after 1.25 s at most, or 1.45 s if another node has to tell of it.
const SILENT_AFTER: u32 = 9;
/// Answers in a row after which one that was believed dead is believed well.
const WELL_AFTER: u32 = 3;
/// A watched peer that is believed dead is asked this often, and one that is not watched.
const SILENT_WATCHED: Duration = Duration::from_millis(500);
const SILENT_OTHER: Duration = Duration::from_secs(5);
/// A peer that is not watched is asked this often, so that a lost hint is made good: a minute, or longer if that would be
/// more than ten questions a second in all.
const REST: Duration = Duration::from_secs(60);
const REST_PER_PEER: Duration = Duration::from_millis(100);
/// A peer that has never answered is asked again after this, doubled each time up to a minute.
const UNHEARD_FIRST: Duration = Duration::from_millis(500);
const UNHEARD_DOUBLINGS: u32 = 7;
/// First questions to all peers: 200 a second.
const FIRST_PER_PEER: Duration = Duration::from_millis(5);
/// Hints about one peer are taken this often: who forges them can make a node ask, and no more than that.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Ask an address whether it answers.
    Ask(IpAddr),
    /// Tell the other nodes that they should look at an address.
    Tell(IpAddr),
    /// Find the gateway of the default route of an address' family: no peer can witness that the node's link is well.
    FindGateway { v6: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It has never answered: perhaps it may not. Nothing is believed of it.
    Unheard,
    Well,
    Doubted,
    Silent,
}

/// How many of the other nodes there are of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// They answer.
    pub answering: usize,
    /// They are believed dead.
    pub silent: usize,
    /// They have never answered: nothing is believed of them.
    pub unheard: usize,
}

#[derive(Debug)]
struct Peer {
    /// Nodes with this address: nearly always one.
    names: BTreeSet<Arc<str>>,
    state: State,
    watched: bool,
    /// When the question was sent that has no answer yet.
    asked: Option<Instant>,
    answered: Option<Instant>,
    unanswered: u32,
    /// Answers since it was believed dead.
    returned: u32,
    looked: Option<Instant>,
    told: bool,
    due: Instant,
}

/// The other nodes, by their address.
#[derive(Debug)]
pub(super) struct Detector {
    own: String,
    /// How many peers are watched all the time.
    watch_at_most: usize,
    peers: BTreeMap<IpAddr, Peer>,
    agenda: BTreeSet<(Instant, IpAddr)>,
    /// Gateways and when they answered.
    gateways: BTreeMap<IpAddr, Option<Instant>>,
    /// Addresses that an earlier agent believed dead.
    believed: BTreeSet<IpAddr>,
    changed: bool,
}

impl Detector {
    pub(super) fn new(own: &str, watch_at_most: usize, believed: BTreeSet<IpAddr>) -> Self {
        Self {
            own: own.to_owned(),
            watch_at_most,
            peers: BTreeMap::new(),
            agenda: BTreeSet::new(),
            gateways: BTreeMap::new(),
            believed,
            changed: false,
        }
    }

    /// Takes in the other nodes. Costs as much as there are, when one comes, goes or moves.
    pub(super) fn set_nodes(&mut self, nodes: &BTreeMap<Arc<str>, IpAddr>, now: Instant) {
        let own_address = nodes.get(self.own.as_str()).copied();
        let mut by_address: BTreeMap<IpAddr, BTreeSet<Arc<str>>> = BTreeMap::new();
        let others = nodes.iter().filter(|(name, at)| ***name != *self.own && Some(**at) != own_address);
        for (name, address) in others {
            by_address.entry(*address).or_default().insert(Arc::clone(name));
        }
        let before = self.peers.len();
        self.peers.retain(|address, peer| {
            let stays = by_address.contains_key(address);
            if !stays {
                self.agenda.remove(&(peer.due, *address));
            }
            stays
        });
        self.changed |= before != self.peers.len();
        let spread = FIRST_PER_PEER * u32::try_from(by_address.len()).unwrap_or(u32::MAX);
        for (address, names) in by_address {
            if let Some(peer) = self.peers.get_mut(&address) {
                self.changed |= peer.names != names;
                peer.names = names;
                continue;
            }
            // An address that somebody else had is a stranger's now, unless this is the start of an agent.
            let state = if self.believed.remove(&address) { State::Silent } else { State::Unheard };
            let due = now + spread.mul_f64(fraction(&self.own, address));
            self.agenda.insert((due, address));
            let peer = Peer {
                names,
                state,
                watched: false,
                asked: None,
                answered: None,
                unanswered: 0,
                returned: 0,
                looked: None,
                told: true,
                due,
            };
            self.peers.insert(address, peer);
            self.changed = true;
        }
        self.believed.clear();
        self.choose_watched(now);
    }

    /// The peers that follow in a ring: each node is watched by as many as it watches itself.
    fn choose_watched(&mut self, now: Instant) {
        let own = place(&self.own);
        let mut ring: Vec<_> =
            self.peers.iter().map(|(address, peer)| (peer_place(peer), *address)).collect();
        ring.sort_unstable();
        let behind = ring.partition_point(|(place, _)| *place <= own);
        ring.rotate_left(behind);
        let watched: BTreeSet<_> = ring.into_iter().take(self.watch_at_most).map(|(_, a)| a).collect();
        let mut new = Vec::new();
        for (address, peer) in &mut self.peers {
            let was = std::mem::replace(&mut peer.watched, watched.contains(address));
            if peer.watched && !was {
                new.push(*address);
            }
        }
        for address in new {
            let due = self.peers.get(&address).map_or(now, |peer| peer.due.min(now + CALM));
            self.schedule(address, due);
        }
    }

    /// Somebody says that one should look at an address; it may be anybody who says so.
    pub(super) fn look(&mut self, address: IpAddr, now: Instant) {
        let Some(peer) = self.peers.get_mut(&address) else { return };
        if peer.looked.is_some_and(|looked| now.saturating_duration_since(looked) < LOOK_EVERY) {
            return;
        }
        peer.looked = Some(now);
        match peer.state {
            State::Well => {
                peer.state = State::Doubted;
                // Whoever says so has told everybody.
                peer.told = true;
            }
            State::Silent | State::Doubted | State::Unheard => {}
        }
        self.schedule(address, now);
    }

    /// An address answers.
    pub(super) fn answered(&mut self, address: IpAddr, now: Instant) -> Vec<Action> {
        if let Some(gateway) = self.gateways.get_mut(&address) {
            *gateway = Some(now);
        }
        let Some(peer) = self.peers.get_mut(&address) else { return Vec::new() };
        let was_asked = peer.asked.take().is_some();
        (peer.answered, peer.unanswered) = (Some(now), 0);
        let mut actions = Vec::new();
        match peer.state {
            // Asked as a witness: its own turn is still to come.
            State::Well if !was_asked => return actions,
            State::Well => {}
            State::Unheard | State::Doubted => {
                self.changed |= peer.state == State::Unheard;
                peer.state = State::Well;
            }
            State::Silent => {
                peer.returned += 1;
                if peer.returned < WELL_AFTER {
                    self.schedule(address, now + HURRY);
                    return actions;
                }
                peer.state = State::Well;
                self.changed = true;
                if peer.watched {
                    actions.push(Action::Tell(address));
                }
            }
        }
        peer.told = false;
        let rest = self.rest(address);
        self.schedule(address, now + rest);
        actions
    }

    /// The gateway of a default route: it witnesses for the node's link when no peer can.
    pub(super) fn set_gateway(&mut self, gateway: Option<IpAddr>, v6: bool) {
        self.gateways.retain(|address, _| address.is_ipv6() != v6 || Some(*address) == gateway);
        if let Some(gateway) = gateway {
            self.gateways.entry(gateway).or_default();
        }
    }

    /// What is due, and when to look again. Answers that have come must have been taken in before.
    pub(super) fn due(&mut self, now: Instant) -> (Vec<Action>, Instant) {
        let mut actions = Vec::new();
        while let Some((due, address)) = self.agenda.first().copied() {
            if due > now {
                return (actions, due);
            }
            self.ask(address, now, &mut actions);
        }
        // Nothing is due by itself while there is no peer; the next event ends the wait.
        (actions, now + REST)
    }

    /// Judges the last question, and asks the next one.
    fn ask(&mut self, address: IpAddr, now: Instant, actions: &mut Vec<Action>) {
        let Some(peer) = self.peers.get(&address) else { return };
        let lacks = peer.asked.is_some_and(|asked| now.saturating_duration_since(asked) >= HURRY);
        // A question that nobody else's answer stands beside says more about this node's link than about the peer.
        let counts = lacks && peer.asked.is_some_and(|asked| self.is_witnessed(address, asked));
        let Some(peer) = self.peers.get_mut(&address) else { return };
        if lacks {
            peer.returned = 0;
            if peer.state == State::Well {
                peer.state = State::Doubted;
            }
        }
        if counts && peer.state == State::Doubted {
            peer.unanswered += 1;
            if peer.unanswered >= TELL_AFTER && peer.watched && !std::mem::replace(&mut peer.told, true) {
                actions.push(Action::Tell(address));
            }
            if peer.unanswered >= SILENT_AFTER {
                peer.state = State::Silent;
                self.changed = true;
            }
        }
        peer.asked = Some(now);
        actions.push(Action::Ask(address));
        let wait = match peer.state {
            State::Doubted => {
                actions.extend(self.ask_witness(address));
                HURRY
            }
            // The answer that it will not have is noticed soon.
            State::Well => HURRY,
            State::Unheard => {
                peer.unanswered = peer.unanswered.saturating_add(1);
                REST.min(UNHEARD_FIRST * (1 << peer.unanswered.min(UNHEARD_DOUBLINGS)))
            }
            State::Silent if peer.watched => SILENT_WATCHED,
            State::Silent => SILENT_OTHER,
        };
        self.schedule(address, now + wait);
    }

    /// Whether anybody but the peer has answered since it was asked.
    fn is_witnessed(&self, peer: IpAddr, since: Instant) -> bool {
        let after = |answered: Option<Instant>| answered.is_some_and(|at| at >= since);
        self.gateways.values().any(|at| after(*at))
            || self.peers.iter().any(|(address, other)| *address != peer && after(other.answered))
    }

    /// Another peer, asked beside a doubted one; without any, the gateway.
    fn ask_witness(&self, doubted: IpAddr) -> Option<Action> {
        let well = self.peers.iter().filter(|(address, peer)| {
            **address != doubted && peer.state == State::Well && peer.asked.is_none()
        });
        if let Some((address, _)) = well.max_by_key(|(_, peer)| peer.answered) {
            return Some(Action::Ask(*address));
        }
        let v6 = doubted.is_ipv6();
        let gateway = self.gateways.keys().find(|gateway| gateway.is_ipv6() == v6 && **gateway != doubted);
        Some(gateway.map_or(Action::FindGateway { v6 }, |gateway| Action::Ask(*gateway)))
    }

    /// How long a peer that is well is left alone.
    fn rest(&self, address: IpAddr) -> Duration {
        match self.peers.get(&address) {
            Some(peer) if peer.watched => CALM,
            Some(_) | None => REST.max(REST_PER_PEER * u32::try_from(self.peers.len()).unwrap_or(u32::MAX)),
        }
    }

    fn schedule(&mut self, address: IpAddr, due: Instant) {
        if let Some(peer) = self.peers.get_mut(&address) {
            self.agenda.remove(&(peer.due, address));
            peer.due = due;
            self.agenda.insert((due, address));
        }
    }

    /// Names and addresses of the nodes believed dead, if that has changed since the last call.
    pub(super) fn take_silent(&mut self) -> Option<BTreeMap<Arc<str>, IpAddr>> {
        std::mem::take(&mut self.changed).then(|| {
            let silent = self.peers.iter().filter(|(_, peer)| peer.state == State::Silent);
            silent.flat_map(|(at, peer)| peer.names.iter().map(|name| (Arc::clone(name), *at))).collect()
        })
    }

    /// Whether this node is one of those that watch a peer.
    pub(super) fn watches(&self, address: IpAddr) -> bool {
        self.peers.get(&address).is_some_and(|peer| peer.watched)
    }

    /// Whether an address is a peer's.
    pub(super) fn is_peer(&self, address: IpAddr) -> bool {
        self.peers.contains_key(&address)
    }

    /// Whom to tell: nobody, if everybody watches everybody.
    pub(super) fn listeners(&self) -> Vec<IpAddr> {
        if self.peers.len() <= self.watch_at_most {
            return Vec::new();
        }
        let others = self.peers.iter().filter(|(_, peer)| peer.state != State::Silent);
        others.map(|(address, _)| *address).collect()
    }

    pub(super) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for peer in self.peers.values() {
            match peer.state {
                State::Well | State::Doubted => counts.answering += 1,
                State::Silent => counts.silent += 1,
                State::Unheard => counts.unheard += 1,
            }
        }
        counts
    }
}

/// A peer's place in the ring: that of the first of its names.
fn peer_place(peer: &Peer) -> u64 {
    peer.names.first().map_or(0, |name| place(name))
}

/// FNV-1a with a finish that spreads names that differ in their last letter: all nodes must agree on it.
fn place(name: &str) -> u64 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    (hash ^ (hash >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A node's own moment to ask a peer first, between 0 and 1.
fn fraction(own: &str, address: IpAddr) -> f64 {
    f64::from(u16::try_from(place(&format!("{own} {address}")) >> 48).unwrap_or(0)) / 65_536.0
}

#[cfg(test)]
mod tests;
