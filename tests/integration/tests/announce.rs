//! Load-balancer addresses on a real link: two nodes, a client, and the death of the node that answers.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_agent_dataplane::announce;
use weft_tests_harness::netns::{Netns, ip};
use weft_tests_harness::{require, wait_until};

/// Before a host's number.
#[derive(Clone, Copy)]
struct Family {
    prefix: &'static str,
    bits: u8,
}

const FAMILIES: [Family; 2] =
    [Family { prefix: "10.99.0.", bits: 24 }, Family { prefix: "fd99::", bits: 64 }];
const VIP: u8 = 200;
const CLIENT: u8 = 254;
const PORT: u16 = 8080;
const PATIENCE: Duration = Duration::from_secs(10);
/// A node on the link answers within this, or not at all.
const ANSWER: Duration = Duration::from_millis(300);

impl Family {
    fn address(self, number: u8) -> IpAddr {
        format!("{}{number}", self.prefix).parse().expect("an address")
    }

    fn network(self, number: u8) -> String {
        format!("{}/{}", self.address(number), self.bits)
    }
}

/// A namespace on the link that announces, and answers connections with its name.
struct Node {
    netns: Netns,
    device: String,
    family: Family,
    wanted: watch::Sender<BTreeSet<IpAddr>>,
    shutdown: CancellationToken,
    agent: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Node {
    fn new(link: &Netns, family: Family, number: u8) -> anyhow::Result<Self> {
        let netns = Netns::new("ann")?;
        let device = format!("to-{number}");
        let pair =
            ["-n", link.name(), "link", "add", &device, "type", "veth", "peer", "name", "eth0", "netns"];
        ip(&[&pair[..], &[netns.name()]].concat())?;
        ip(&["-n", link.name(), "link", "set", &device, "master", "br0", "up"])?;
        // As a node of a cluster has it.
        let forwards = netns.thread(|| Ok(weft_cni_netlink::sysctl::forward_ipv6()?))?;
        forwards.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))??;
        add_address(&netns, &family.network(number), "eth0")?;
        ip(&["-n", netns.name(), "link", "set", "eth0", "up"])?;
        serve(&netns, number)?;
        let mut node = Self {
            netns,
            device,
            family,
            wanted: watch::channel(BTreeSet::new()).0,
            shutdown: CancellationToken::new(),
            agent: None,
        };
        node.start(number)?;
        Ok(node)
    }

    fn start(&mut self, number: u8) -> anyhow::Result<()> {
        self.shutdown = CancellationToken::new();
        let (wanted, shutdown) = (self.wanted.subscribe(), self.shutdown.clone());
        let own = self.family.address(number);
        self.agent = Some(self.netns.thread(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(announce::run(own, wanted, shutdown))?;
            Ok(())
        })?);
        Ok(())
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        let agent = self.agent.take().context("an agent runs")?;
        agent.join().map_err(|panic| anyhow::anyhow!("the agent panicked: {panic:?}"))?
    }
}

fn add_address(netns: &Netns, network: &str, device: &str) -> anyhow::Result<()> {
    let flags: &[&str] = if network.contains(':') { &["nodad"] } else { &[] };
    ip(&[&["-n", netns.name(), "addr", "add", network, "dev", device], flags].concat())
}

/// Answers each connection with the node's number, for as long as the test runs.
fn serve(netns: &Netns, number: u8) -> anyhow::Result<()> {
    let bound = netns.thread(|| Ok(TcpListener::bind(("::", PORT))?))?;
    let listener = bound.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))??;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(&[number]);
        }
    });
    Ok(())
}

/// Which node answers at the address; the error of the attempt if none.
fn ask(link: &Netns, family: Family) -> anyhow::Result<u8> {
    let to = SocketAddr::from((family.address(VIP), PORT));
    let asked = link.thread(move || {
        let mut stream = TcpStream::connect_timeout(&to, ANSWER)?;
        // A node that lets go of the address can't answer what it had accepted.
        stream.set_read_timeout(Some(ANSWER))?;
        let mut number = [0];
        stream.read_exact(&mut number)?;
        Ok(number[0])
    })?;
    asked.join().map_err(|panic| anyhow::anyhow!("{panic:?}"))?
}

fn answering(link: &Netns, family: Family, wanted: impl Fn(u8) -> bool) -> anyhow::Result<u8> {
    wait_until("a node answers", PATIENCE, || Ok(ask(link, family).ok().filter(|number| wanted(*number))))
}

#[test]
fn an_address_is_held_by_one_node_and_moves_when_it_dies() -> anyhow::Result<()> {
    if !require("announce", &["root"]) {
        return Ok(());
    }
    FAMILIES.into_iter().try_for_each(moves)
}

fn moves(family: Family) -> anyhow::Result<()> {
    let link = Netns::new("annl")?;
    ip(&["-n", link.name(), "link", "add", "br0", "type", "bridge"])?;
    add_address(&link, &family.network(CLIENT), "br0")?;
    ip(&["-n", link.name(), "link", "set", "br0", "up"])?;
    let mut nodes = [Node::new(&link, family, 1)?, Node::new(&link, family, 2)?];
    let address = BTreeSet::from([family.address(VIP)]);
    // One after the other: two that begin at once may both take it for a moment.
    let (holder, heir, first) = (0, 1, 1);
    nodes[holder].wanted.send_replace(address.clone());
    assert_eq!(answering(&link, family, |_| true)?, first);
    nodes[heir].wanted.send_replace(address);

    // The agent's end is not the node's: the kernel answers on, and the next agent takes over what it finds.
    nodes[holder].stop()?;
    assert_eq!(ask(&link, family)?, first);
    nodes[holder].start(first)?;
    assert_eq!(ask(&link, family)?, first);

    ip(&["-n", link.name(), "link", "set", &nodes[holder].device, "down"])?;
    let second = answering(&link, family, |number| number != first)?;
    assert_eq!(usize::from(second) - 1, heir);

    // Back again, it still has the address: one of the two lets go, and only one answers from then on.
    ip(&["-n", link.name(), "link", "set", &nodes[holder].device, "up"])?;
    let held = |node: &Node| -> anyhow::Result<bool> {
        let shown = std::process::Command::new("ip").args(["-n", node.netns.name(), "addr"]).output()?;
        Ok(String::from_utf8_lossy(&shown.stdout).contains(&format!(" {}/", family.address(VIP))))
    };
    wait_until("one holds it", PATIENCE, || Ok((held(&nodes[0])? != held(&nodes[1])?).then_some(())))?;
    answering(&link, family, |_| true)?;

    // No longer fit, a node gives it to the other; with none fit, nobody answers.
    let now = if held(&nodes[0])? { 0 } else { 1 };
    nodes[now].wanted.send_replace(BTreeSet::new());
    answering(&link, family, |number| usize::from(number) - 1 != now)?;
    nodes[1 - now].wanted.send_replace(BTreeSet::new());
    wait_until("nobody holds it", PATIENCE, || Ok((!held(&nodes[0])? && !held(&nodes[1])?).then_some(())))?;
    for node in &mut nodes {
        node.stop()?;
    }
    Ok(())
}
