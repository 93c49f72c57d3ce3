//! Who answers for an address, from what one node hears. Pure: time and frames come in, actions go out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use weft_cni_netlink::Mac;

/// A node that doesn't hold an address asks for it this often.
const ASK_EVERY: Duration = Duration::from_millis(250);
/// After so long without an answer the address is free: three questions and their answers may be lost.
const SILENCE: Duration = Duration::from_millis(1_000);
/// Nodes wait up to this much longer, each its own time, so that mostly one is first.
const SPREAD_MILLIS: u64 = 300;
/// Announcements are repeated, since they may be lost (RFC 5227 §1.1 and RFC 4861 §7.2.6 have the same).
const REPEATS: u8 = 3;
const REPEAT_EVERY: Duration = Duration::from_millis(250);

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Ask who has the address: its last holder if one is known, else everybody.
    Ask(IpAddr, Option<Mac>),
    /// Take the address.
    Take(IpAddr),
    /// Tell everybody on the link that it is here.
    Announce(IpAddr),
    /// Let go of it.
    Give(IpAddr),
}

#[derive(Clone, Copy, Debug)]
enum State {
    Listening { heard: Instant, holder: Option<Mac>, ask: Instant },
    Holding { repeats: u8, next: Instant },
}

/// The addresses that this node may hold.
#[derive(Debug)]
pub(super) struct Election {
    own: Mac,
    states: BTreeMap<IpAddr, State>,
}

impl Election {
    /// `held` are the addresses that are on the node already; the first [`want`](Self::want) decides on them.
    pub(super) fn new(own: Mac, held: BTreeSet<IpAddr>, now: Instant) -> Self {
        let holding = State::Holding { repeats: 1, next: now };
        Self { own, states: held.into_iter().map(|address| (address, holding)).collect() }
    }

    /// This node's hardware address.
    #[cfg(test)]
    fn own(&self) -> Mac {
        self.own
    }

    /// The addresses that this node is fit to hold have changed.
    pub(super) fn want(&mut self, wanted: &BTreeSet<IpAddr>, now: Instant) -> Vec<Action> {
        let gone: Vec<_> = self.states.keys().filter(|a| !wanted.contains(a)).copied().collect();
        let mut actions = Vec::new();
        for address in gone {
            if let Some(State::Holding { .. }) = self.states.remove(&address) {
                actions.push(Action::Give(address));
            }
        }
        for address in wanted {
            self.states.entry(*address).or_insert(State::Listening { heard: now, holder: None, ask: now });
        }
        actions
    }

    /// A frame says that `mac` has the address.
    pub(super) fn heard(&mut self, address: IpAddr, mac: Mac, now: Instant) -> Vec<Action> {
        let own = self.own;
        let Some(state) = self.states.get_mut(&address).filter(|_| mac != own) else { return Vec::new() };
        match state {
            State::Listening { heard, holder, .. } => {
                (*heard, *holder) = (now, Some(mac));
                Vec::new()
            }
            // Two hold it, after a partition: the lower hardware address keeps it, and both know that.
            State::Holding { .. } if mac.0 < own.0 => {
                *state = State::Listening { heard: now, holder: Some(mac), ask: now + ASK_EVERY };
                vec![Action::Give(address)]
            }
            State::Holding { .. } => vec![Action::Announce(address)],
        }
    }

    /// What is due, and when to look again.
    pub(super) fn due(&mut self, now: Instant) -> (Vec<Action>, Instant) {
        let mut actions = Vec::new();
        // Nothing is due by itself while there is no address; the next event ends the wait.
        let mut next = now + Duration::from_secs(3_600);
        for (address, state) in &mut self.states {
            match state {
                State::Listening { heard, .. } if now >= *heard + SILENCE + spread(self.own, *address) => {
                    actions.extend([Action::Take(*address), Action::Announce(*address)]);
                    *state = State::Holding { repeats: REPEATS - 1, next: now + REPEAT_EVERY };
                    next = next.min(now + REPEAT_EVERY);
                }
                State::Listening { heard, holder, ask } => {
                    if now >= *ask {
                        // The holder may have gone: the second question is for everybody.
                        let to = holder.filter(|_| now < *heard + ASK_EVERY * 2);
                        actions.push(Action::Ask(*address, to));
                        *ask = now + ASK_EVERY;
                    }
                    next = next.min(*ask).min(*heard + SILENCE + spread(self.own, *address));
                }
                State::Holding { repeats: 0, .. } => {}
                State::Holding { repeats, next: due } => {
                    if now >= *due {
                        actions.push(Action::Announce(*address));
                        *repeats -= 1;
                        *due = now + REPEAT_EVERY;
                    }
                    next = next.min(*due);
                }
            }
        }
        (actions, next)
    }
}

/// A node's own delay for an address: spreads addresses over nodes, and nodes over time.
fn spread(own: Mac, address: IpAddr) -> Duration {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let bytes = own.0.into_iter().chain(octets);
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    Duration::from_millis((hash >> 32) % SPREAD_MILLIS)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 44, 0, 200));
    const STEP: Duration = Duration::from_millis(10);

    /// Nodes on one link: a question is answered by whoever holds the address, an announcement is heard by all.
    struct Link {
        nodes: Vec<(Election, BTreeSet<IpAddr>, bool)>,
        now: Instant,
    }

    impl Link {
        fn new(count: u8) -> Self {
            let now = Instant::now();
            let node =
                |i| (Election::new(Mac([2, 0, 0, 0, 0, i]), BTreeSet::new(), now), BTreeSet::new(), true);
            Self { nodes: (0..count).map(node).collect(), now }
        }

        fn want(&mut self, node: usize, wanted: &[IpAddr]) {
            let wanted = wanted.iter().copied().collect();
            let actions = self.nodes[node].0.want(&wanted, self.now);
            self.act(node, actions);
        }

        fn act(&mut self, node: usize, actions: Vec<Action>) {
            for action in actions {
                match action {
                    Action::Take(address) => drop(self.nodes[node].1.insert(address)),
                    Action::Give(address) => drop(self.nodes[node].1.remove(&address)),
                    Action::Announce(address) => {
                        let mac = self.nodes[node].0.own();
                        for other in 0..self.nodes.len() {
                            if other != node && self.nodes[node].2 && self.nodes[other].2 {
                                let answer = self.nodes[other].0.heard(address, mac, self.now);
                                self.act(other, answer);
                            }
                        }
                    }
                    Action::Ask(address, _) => {
                        for other in 0..self.nodes.len() {
                            let (election, held, up) = &self.nodes[other];
                            if other != node && *up && self.nodes[node].2 && held.contains(&address) {
                                let mac = election.own();
                                let answer = self.nodes[node].0.heard(address, mac, self.now);
                                self.act(node, answer);
                            }
                        }
                    }
                }
            }
        }

        fn run(&mut self, time: Duration) {
            let end = self.now + time;
            while self.now < end {
                self.now += STEP;
                for node in 0..self.nodes.len() {
                    let (actions, _) = self.nodes[node].0.due(self.now);
                    self.act(node, actions);
                }
            }
        }

        fn holders(&self) -> Vec<usize> {
            (0..self.nodes.len()).filter(|i| self.nodes[*i].2 && self.nodes[*i].1.contains(&VIP)).collect()
        }
    }

    #[test]
    fn one_node_takes_an_address_and_keeps_it() {
        let mut link = Link::new(5);
        for node in 0..5 {
            link.want(node, &[VIP]);
        }
        link.run(Duration::from_secs(2));
        let first = link.holders();
        assert_eq!(first.len(), 1);
        link.run(Duration::from_secs(60));
        assert_eq!(link.holders(), first);
    }

    #[test]
    fn another_takes_it_within_two_seconds_of_the_holders_death() {
        let mut link = Link::new(3);
        for node in 0..3 {
            link.want(node, &[VIP]);
        }
        link.run(Duration::from_secs(2));
        let dead = link.holders()[0];
        link.nodes[dead].2 = false;
        link.run(Duration::from_secs(2));
        let heir = link.holders();
        assert_eq!(heir.len(), 1);
        assert_ne!(heir[0], dead);
        // Back from the dead, still with the address: one of the two lets go.
        link.nodes[dead].2 = true;
        let announce = vec![Action::Announce(VIP)];
        link.act(dead, announce);
        link.run(Duration::from_secs(2));
        assert_eq!(link.holders().len(), 1);
    }

    #[test]
    fn only_fit_nodes_hold_it() {
        let mut link = Link::new(2);
        link.want(1, &[VIP]);
        link.run(Duration::from_secs(2));
        assert_eq!(link.holders(), [1]);
        link.want(0, &[VIP]);
        link.want(1, &[]);
        link.run(Duration::from_secs(2));
        assert_eq!(link.holders(), [0]);
        link.want(0, &[]);
        assert_eq!(link.holders(), [0_usize; 0]);
        assert_eq!(link.nodes[0].0.due(link.now).0, []);
    }

    #[test]
    fn what_an_earlier_agent_holds_is_kept_if_it_is_wanted() {
        let now = Instant::now();
        let other = IpAddr::from([10, 44, 0, 201]);
        let mut election = Election::new(Mac([2; 6]), BTreeSet::from([VIP, other]), now);
        assert_eq!(election.want(&BTreeSet::from([VIP]), now), [Action::Give(other)]);
        assert_eq!(election.due(now).0, [Action::Announce(VIP)]);
    }
}
