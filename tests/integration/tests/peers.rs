//! Nodes that watch each other on a real link: deaths, returns, cut links, restarts of agents.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane::peers::{self, Counts, Nodes, Told};
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::{require, wait_until};

const PATIENCE: Duration = Duration::from_secs(20);

fn name(number: usize) -> String {
    format!("node-{number}")
}

fn address(number: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 98, 0, 1)) + u32::try_from(number).unwrap_or(0))
}

/// A namespace on the link, with an agent's watch over the others.
struct Node {
    netns: Netns,
    device: String,
    number: usize,
    watched: usize,
    pins: tempfile::TempDir,
    nodes: watch::Sender<Nodes>,
    silent: watch::Receiver<Nodes>,
    counts: Arc<Mutex<Counts>>,
    shutdown: CancellationToken,
    agent: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Node {
    fn new(link: &Netns, number: usize, watched: usize, nodes: &Nodes) -> anyhow::Result<Self> {
        let netns = Netns::new("peer")?;
        let device = format!("to-{number}");
        let pair =
            ["-n", link.name(), "link", "add", &device, "type", "veth", "peer", "name", "eth0", "netns"];
        ip(&[&pair[..], &[netns.name()]].concat())?;
        ip(&["-n", link.name(), "link", "set", &device, "master", "br0", "up"])?;
        ip(&["-n", netns.name(), "addr", "add", &format!("{}/24", address(number)), "dev", "eth0"])?;
        ip(&["-n", netns.name(), "link", "set", "eth0", "up"])?;
        ip(&["-n", netns.name(), "route", "add", "default", "via", "10.98.0.254"])?;
        Ok(Self {
            netns,
            device,
            number,
            watched,
            pins: tempfile::tempdir()?,
            nodes: watch::channel(nodes.clone()).0,
            silent: watch::channel(Nodes::new()).1,
            shutdown: CancellationToken::new(),
            counts: Arc::default(),
            agent: None,
        })
    }

    fn start(&mut self) -> anyhow::Result<()> {
        self.shutdown = CancellationToken::new();
        let (silent, is_silent) = watch::channel(Nodes::new());
        self.silent = is_silent;
        let config = peers::Config {
            node_name: name(self.number),
            watched: self.watched,
            pins: self.pins.path().to_owned(),
        };
        let (nodes, shutdown) = (self.nodes.subscribe(), self.shutdown.clone());
        let counts = Arc::clone(&self.counts);
        let told = Told::new(silent, move |now| {
            if let Ok(mut counts) = counts.lock() {
                *counts = now;
            }
        });
        self.agent = Some(self.netns.thread(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(peers::run(config, nodes, told, shutdown));
            Ok(())
        })?);
        Ok(())
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        let agent = self.agent.take().context("an agent runs")?;
        agent.join().map_err(|panic| anyhow::anyhow!("the agent panicked: {panic:?}"))?
    }

    fn silent(&self) -> BTreeSet<String> {
        self.silent.borrow().keys().map(|name| name.to_string()).collect()
    }

    /// The folders that other tools see.
    fn kept(&self) -> anyhow::Result<usize> {
        match std::fs::read_dir(self.pins.path().join("silent")) {
            Ok(entries) => Ok(entries.count()),
            Err(_) => Ok(0),
        }
    }
}

struct Net {
    link: Netns,
    nodes: Vec<Node>,
}

impl Net {
    fn new(count: usize, watched: usize) -> anyhow::Result<Self> {
        let link = Netns::new("peerl")?;
        ip(&["-n", link.name(), "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", link.name(), "addr", "add", "10.98.0.254/24", "dev", "br0"])?;
        ip(&["-n", link.name(), "link", "set", "br0", "up"])?;
        let all: Nodes =
            (0..count).map(|i| (Arc::from(name(i)), IpAddr::V4(address(i)))).collect::<BTreeMap<_, _>>();
        let nodes = (0..count).map(|i| Node::new(&link, i, watched, &all)).collect::<anyhow::Result<_>>()?;
        let mut net = Self { link, nodes };
        net.nodes.iter_mut().try_for_each(Node::start)?;
        // Nobody is believed dead who has not answered before.
        wait_until("all have heard all", PATIENCE, || {
            let heard = |node: &Node| node.counts.lock().is_ok_and(|counts| counts.answering == count - 1);
            Ok(net.nodes.iter().all(heard).then_some(()))
        })?;
        Ok(net)
    }

    fn set(&self, number: usize, up: bool) -> anyhow::Result<()> {
        let state = if up { "up" } else { "down" };
        ip(&["-n", self.link.name(), "link", "set", &self.nodes[number].device, state])
    }

    /// Whether all others believe that one dead, and nobody else.
    fn agree(&self, dead: usize) -> bool {
        let wanted = BTreeSet::from([name(dead)]);
        self.nodes.iter().all(|node| node.number == dead || node.silent() == wanted)
    }

    fn all_well(&self) -> anyhow::Result<()> {
        wait_until("nobody is believed dead", PATIENCE, || {
            Ok(self.nodes.iter().all(|node| node.silent().is_empty()).then_some(()))
        })
        .with_context(|| format!("{:?}", self.nodes.iter().map(Node::silent).collect::<Vec<_>>()))
    }
}

/// Cuts each node off in turn, and checks what all believe meanwhile and afterwards.
fn deaths(net: &mut Net) -> anyhow::Result<()> {
    for dead in 0..net.nodes.len() {
        let since = Instant::now();
        net.set(dead, false)?;
        wait_until("all others believe it dead", PATIENCE, || Ok(net.agree(dead).then_some(())))?;
        eprintln!("{} of {} believed dead after {:?}", dead, net.nodes.len(), since.elapsed());
        assert_eq!(net.nodes[dead].silent(), BTreeSet::new(), "its own link is cut: it believes nothing");
        let other = (dead + 1) % net.nodes.len();
        assert_eq!(net.nodes[other].kept()?, 1);

        // The next agent starts with it, before it has asked anybody.
        net.nodes[other].stop()?;
        net.nodes[other].start()?;
        let mut silent = net.nodes[other].silent.clone();
        let first = wait_until("the next agent speaks", PATIENCE, || {
            Ok(silent.has_changed()?.then(|| silent.borrow_and_update().len()))
        })?;
        assert_eq!(first, 1);

        let since = Instant::now();
        net.set(dead, true)?;
        net.all_well()?;
        eprintln!("well again after {:?}", since.elapsed());
        assert_eq!(net.nodes[other].kept()?, 0);
    }
    Ok(())
}

#[test]
fn a_dead_node_is_noticed_by_all_and_so_is_its_return() -> anyhow::Result<()> {
    if !require("peers::a_dead_node_is_noticed_by_all_and_so_is_its_return", &["root", "ip"]) {
        return Ok(());
    }
    let mut net = Net::new(3, peers::WATCHED)?;
    deaths(&mut net)?;

    // An agent that goes away is nobody's death: the node's kernel answers.
    net.nodes[1].stop()?;
    let mut others = [net.nodes[0].silent.clone(), net.nodes[2].silent.clone()];
    // The death of a third passes meanwhile: had they thought anything of the first, they would say it with that.
    net.set(2, false)?;
    wait_until("the other is believed dead", PATIENCE, || {
        Ok((net.nodes[0].silent() == BTreeSet::from([name(2)])).then_some(()))
    })?;
    net.set(2, true)?;
    net.nodes[1].start()?;
    net.all_well()?;
    for silent in &mut others {
        assert!(!silent.borrow().contains_key("node-1"));
    }

    // A Node that is deleted is no longer anybody's business.
    net.set(2, false)?;
    wait_until("the third is believed dead", PATIENCE, || Ok(net.agree(2).then_some(())))?;
    for node in &net.nodes {
        node.nodes.send_modify(|nodes| {
            nodes.remove("node-2");
        });
    }
    net.all_well()?;
    net.nodes.iter_mut().try_for_each(Node::stop)
}

#[test]
fn nodes_that_watch_one_other_each_tell_the_rest() -> anyhow::Result<()> {
    if !require("peers::nodes_that_watch_one_other_each_tell_the_rest", &["root", "ip"]) {
        return Ok(());
    }
    let mut net = Net::new(5, 1)?;
    deaths(&mut net)?;
    net.nodes.iter_mut().try_for_each(Node::stop)
}

#[test]
fn two_nodes_and_their_gateway() -> anyhow::Result<()> {
    if !require("peers::two_nodes_and_their_gateway", &["root", "ip"]) {
        return Ok(());
    }
    let mut net = Net::new(2, peers::WATCHED)?;
    deaths(&mut net)?;
    net.nodes.iter_mut().try_for_each(Node::stop)
}
