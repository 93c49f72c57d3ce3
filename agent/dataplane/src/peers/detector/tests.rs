//! A network of detectors in paused time: who is believed dead, when, by whom, and at what cost.

use super::*;

const STEP: Duration = Duration::from_millis(10);
/// The promise: a dead node's endpoints are out within this.
const BOUND: Duration = Duration::from_millis(1_800);

fn ip(number: usize) -> IpAddr {
    IpAddr::from([10, 44, u8::try_from(number / 250).unwrap(), u8::try_from(number % 250 + 2).unwrap()])
}

fn gateway() -> IpAddr {
    IpAddr::from([10, 44, 255, 1])
}

/// Nodes on one network. A kernel answers at once if both ends are up, agent or not.
struct Net {
    nodes: Vec<Detector>,
    /// A node's link.
    up: Vec<bool>,
    /// A node's agent.
    agent: Vec<bool>,
    has_gateway: bool,
    /// Answers are lost until the step's end, as if they took that long.
    delay: Duration,
    waiting: Vec<(Instant, usize, IpAddr)>,
    now: Instant,
    asked: usize,
    hints: usize,
}

impl Net {
    fn new(count: usize, watch_at_most: usize) -> Self {
        let now = Instant::now();
        let names: BTreeMap<Arc<str>, IpAddr> =
            (0..count).map(|i| (format!("node-{i}").into(), ip(i))).collect();
        let node = |i: usize| {
            let mut detector = Detector::new(&format!("node-{i}"), watch_at_most, BTreeSet::new());
            detector.set_nodes(&names, now);
            detector
        };
        Self {
            nodes: (0..count).map(node).collect(),
            up: vec![true; count],
            agent: vec![true; count],
            has_gateway: true,
            delay: Duration::ZERO,
            waiting: Vec::new(),
            now,
            asked: 0,
            hints: 0,
        }
    }

    fn number(&self, address: IpAddr) -> Option<usize> {
        (0..self.nodes.len()).find(|i| ip(*i) == address)
    }

    fn act(&mut self, node: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Ask(to) => {
                    self.asked += 1;
                    let up = self.number(to).map_or(self.has_gateway, |to| self.up[to]);
                    if up && self.up[node] {
                        self.waiting.push((self.now + self.delay, node, to));
                    }
                }
                Action::Tell(about) => {
                    for to in self.nodes[node].listeners() {
                        self.hints += 1;
                        let number = self.number(to).unwrap();
                        if self.up[node] && self.up[number] && self.agent[number] {
                            self.nodes[number].look(about, self.now);
                        }
                    }
                }
                Action::FindGateway { v6 } => {
                    let found = self.has_gateway.then(gateway);
                    self.nodes[node].set_gateway(found, v6);
                }
            }
        }
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += STEP;
            let (come, waiting) =
                std::mem::take(&mut self.waiting).into_iter().partition(|(at, ..)| *at <= self.now);
            self.waiting = waiting;
            let come: Vec<(Instant, usize, IpAddr)> = come;
            for (_, node, from) in come {
                let actions = self.nodes[node].answered(from, self.now);
                self.act(node, actions);
            }
            for node in (0..self.nodes.len()).filter(|i| self.agent[*i]).collect::<Vec<_>>() {
                let (actions, next) = self.nodes[node].due(self.now);
                assert!(next > self.now);
                self.act(node, actions);
            }
        }
    }

    /// Whom a node believes dead.
    fn silent(&self, node: usize) -> Vec<usize> {
        let peers = self.nodes[node].peers.iter();
        peers.filter(|(_, p)| p.state == State::Silent).map(|(a, _)| self.number(*a).unwrap()).collect()
    }

    fn believers(&self, dead: usize) -> usize {
        (0..self.nodes.len()).filter(|i| *i != dead && self.silent(*i) == [dead]).count()
    }

    fn all_well(&self) -> bool {
        (0..self.nodes.len()).all(|i| self.silent(i).is_empty())
    }
}

#[test]
fn a_death_is_believed_by_all_within_the_bound_and_so_is_a_return() {
    for (count, watched) in [(2, 8), (3, 8), (9, 8), (40, 8), (40, 1)] {
        let mut net = Net::new(count, watched);
        net.run(Duration::from_secs(5));
        assert!(net.all_well());
        for (round, dead) in [0, count - 1].into_iter().enumerate() {
            net.run(Duration::from_millis(170 * round as u64));
            net.up[dead] = false;
            net.run(BOUND);
            assert_eq!(net.believers(dead), count - 1, "of {count}, each watching {watched}");
            assert_eq!(net.silent(dead), [0; 0], "cut off, it believes in nobody's death");
            net.run(Duration::from_secs(20));
            assert_eq!(net.believers(dead), count - 1);
            assert_eq!(net.silent(dead), [0; 0]);
            net.up[dead] = true;
            net.run(BOUND);
            assert!(net.all_well(), "of {count}, each watching {watched}");
        }
    }
}

#[test]
fn agents_come_and_go_without_a_death() {
    let mut net = Net::new(5, 8);
    net.run(Duration::from_secs(2));
    net.agent[1] = false;
    net.agent[3] = false;
    net.run(Duration::from_secs(30));
    assert!(net.all_well());
    // One that stood still for half a minute takes in what has come before it judges.
    net.agent[1] = true;
    net.run(Duration::from_secs(5));
    assert!(net.all_well());
}

#[test]
fn a_short_break_or_a_slow_network_is_no_death() {
    let mut net = Net::new(4, 8);
    net.run(Duration::from_secs(2));
    for _ in 0..10 {
        net.up[2] = false;
        net.run(Duration::from_millis(600));
        net.up[2] = true;
        net.run(Duration::from_millis(500));
        assert!(net.all_well());
    }
    net.delay = Duration::from_millis(400);
    net.run(Duration::from_secs(30));
    assert!(net.all_well());
}

#[test]
fn who_hears_nobody_believes_nothing_also_when_its_link_comes_back() {
    for has_gateway in [true, false] {
        let mut net = Net::new(10, 4);
        net.has_gateway = has_gateway;
        net.run(Duration::from_secs(5));
        for cut in [1_000, 3_000, 60_000] {
            net.up[7] = false;
            net.run(Duration::from_millis(cut));
            assert_eq!(net.silent(7), [0; 0]);
            net.up[7] = true;
            for _ in 0..200 {
                net.run(STEP);
                assert_eq!(net.silent(7), [0; 0]);
            }
            net.run(BOUND);
            assert!(net.all_well());
        }
    }
}

#[test]
fn two_nodes_need_a_gateway_to_witness() {
    let mut net = Net::new(2, 8);
    net.has_gateway = false;
    net.run(Duration::from_secs(2));
    net.up[1] = false;
    net.run(Duration::from_secs(60));
    assert!(net.all_well());
}

#[test]
fn half_of_the_nodes_may_die_at_once() {
    let mut net = Net::new(20, 4);
    net.run(Duration::from_secs(5));
    (0..10).for_each(|i| net.up[i] = false);
    // Ten watchers of four each: a node all of whose watchers died is found by the others' own questions, later.
    net.run(Duration::from_secs(70));
    for node in 10..20 {
        assert_eq!(net.silent(node), (0..10).collect::<Vec<_>>());
    }
}

#[test]
fn one_that_never_answered_is_not_believed_dead() {
    let mut net = Net::new(3, 8);
    net.up[2] = false;
    net.run(Duration::from_secs(300));
    assert!(net.all_well());
    assert_eq!(net.nodes[0].counts(), Counts { answering: 1, silent: 0, unheard: 1 });
    net.up[2] = true;
    net.run(Duration::from_secs(65));
    assert_eq!(net.nodes[0].counts(), Counts { answering: 2, silent: 0, unheard: 0 });
}

#[test]
fn what_an_earlier_agent_believed_holds_until_it_answers() {
    let mut net = Net::new(3, 8);
    let names = |net: &Net| -> BTreeMap<Arc<str>, IpAddr> {
        (0..net.nodes.len()).map(|i| (format!("node-{i}").into(), ip(i))).collect()
    };
    let mut restarted = Detector::new("node-0", 8, BTreeSet::from([ip(1), ip(2), ip(9)]));
    restarted.set_nodes(&names(&net), net.now);
    net.nodes[0] = restarted;
    net.up[2] = false;
    assert_eq!(net.silent(0), [1, 2]);
    net.run(BOUND);
    assert_eq!(net.silent(0), [2]);
}

#[test]
fn the_cost_does_not_follow_the_number_of_nodes() {
    let per_node_and_second = |count: usize| {
        let mut net = Net::new(count, 8);
        net.run(Duration::from_secs(10));
        net.asked = 0;
        net.run(Duration::from_secs(10));
        net.asked as f64 / 10.0 / count as f64
    };
    let (few, many) = (per_node_and_second(9), per_node_and_second(150));
    assert!((28.0..34.0).contains(&few), "{few} questions a second");
    assert!(many < few + 10.0, "{many} questions a second");
}

#[test]
fn forged_hints_make_a_node_ask_and_no_more() {
    let mut net = Net::new(30, 2);
    net.run(Duration::from_secs(5));
    (net.asked, net.hints) = (0, 0);
    for _ in 0..1_000 {
        for about in 0..30 {
            net.nodes[5].look(ip(about), net.now);
        }
        net.run(STEP);
    }
    assert!(net.all_well());
    assert_eq!(net.hints, 0);
    // Ten seconds: two looks a second at each peer, of a question and its witness each, besides what it asks anyway.
    assert!(net.asked < 30 * 10 * 2 * 2 + 30 * 10 * 12, "{} questions", net.asked);
}

#[test]
fn nodes_that_leave_the_cluster_are_forgotten() {
    let mut net = Net::new(4, 8);
    net.run(Duration::from_secs(2));
    net.up[3] = false;
    net.run(BOUND);
    assert_eq!(net.silent(0), [3]);
    assert_eq!(net.nodes[0].take_silent().unwrap().len(), 1);
    let left: BTreeMap<Arc<str>, IpAddr> = (0..3).map(|i| (format!("node-{i}").into(), ip(i))).collect();
    net.nodes[0].set_nodes(&left, net.now);
    assert_eq!(net.nodes[0].take_silent().unwrap().len(), 0);
    assert_eq!(net.nodes[0].agenda.len(), 2);
}
