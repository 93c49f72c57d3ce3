//! The way of a packet once its destination is decided: the route there, who takes it, the way back, and the packet's size.

use std::net::IpAddr;

use weft_agent_dataplane::observe::path::{Path, Way};
use weft_agent_dataplane::observe::wire::{BackendKeyed, Listener, Listening, Request};

use super::Why;
use super::report::Step;
use crate::net::reach::NodeHandle;

/// Where the packets of an attempt go in the end.
#[derive(Clone, Debug)]
pub(super) struct Destination {
    /// Address, port and protocol after translation.
    pub(super) key: BackendKeyed,
    /// The pod there, with its uid.
    pub(super) pod: Option<(String, Option<String>)>,
    /// The node that it is on, as far as known.
    pub(super) node: Option<String>,
    /// It is on the network of its node.
    pub(super) host_network: bool,
}

impl Destination {
    fn describe(&self) -> String {
        match &self.pod {
            Some((pod, _)) => format!("{} (pod {pod})", self.key),
            None => self.key.to_string(),
        }
    }
}

/// Whose packets are on the way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sender<'a> {
    /// The node that decides for them.
    pub(super) node: &'a NodeHandle,
    /// The address that the answer goes to; `None` for the one that the node chooses by its routes.
    pub(super) address: Option<IpAddr>,
    /// The client is a pod of that node: its packets are as large as its device takes.
    pub(super) pod: Option<IpAddr>,
}

impl Why<'_> {
    /// Looks at the whole way; answers whether it works.
    pub(super) async fn way(&mut self, sender: Sender<'_>, to: &Destination) -> anyhow::Result<bool> {
        let there = path(sender.node, to.key.address)?;
        if !self.may_leave(sender, &there, to).await? {
            return Ok(false);
        }
        if !self.route(sender.node, &there, to) {
            return Ok(false);
        }
        let Some(node) = to.node.as_deref() else {
            self.report.push(Step::note(
                "listen",
                format!("{} is no endpoint of a node; what is there can't be seen", to.key),
            ));
            return Ok(true);
        };
        let Ok(receiver) = self.reach.node(node) else {
            let says =
                format!("node {node} is not on this machine; what happens there can't be seen from here");
            self.report.push(Step::note("listen", says));
            return Ok(true);
        };
        if !self.may_enter(sender, receiver, &there, to).await? {
            return Ok(false);
        }
        let arrives = path(receiver, to.key.address)?;
        if !self.delivered(receiver, &arrives, to)? {
            return Ok(false);
        }
        let Some(client) = sender.address.or(there.source) else { return Ok(true) };
        let back = path(receiver, client)?;
        if !self.back(receiver, &back) {
            return Ok(false);
        }
        self.size(sender, &there, &back)?;
        Ok(true)
    }

    fn route(&mut self, node: &NodeHandle, path: &Path, to: &Destination) -> bool {
        let object = to.node.as_ref().map(|node| format!("Node {node}"));
        let device = path.device.as_deref().unwrap_or("?");
        let fail = |says: String| Step::fail("route", says).on(&node.name).by(object.clone());
        let step = match (path.way, &path.missing) {
            (Way::None, _) => fail(format!("no route to {}", to.describe())),
            (_, Some(missing)) => {
                fail(format!("the route to {} leads into the overlay, but there is {missing}", to.describe()))
            }
            (Way::Device, None) if !path.running => {
                fail(format!("the route to {} leaves by {device}, which carries no packets", to.describe()))
            }
            (Way::Local, None) => {
                Step::ok("route", format!("{} is the node's own", to.describe())).on(&node.name)
            }
            (Way::Device, None) => match self.tunnel(path, to) {
                Ok(says) => Step::ok("route", format!("{} by {device}{says}", to.describe())).on(&node.name),
                Err(says) => fail(says),
            },
        };
        let works = step.verdict != super::report::Verdict::Fail;
        self.report.push(step);
        works
    }

    /// What is to be said of a tunnel, or that it leads to another node than it should.
    fn tunnel(&self, path: &Path, to: &Destination) -> Result<String, String> {
        let Some(tunnel) = path.tunnel else {
            return Ok(path.gateway.map(|gateway| self.router(gateway)).unwrap_or_default());
        };
        let at = super::ends::node_at(&self.nodes, tunnel);
        match (&to.node, &at) {
            (Some(wanted), Some(at)) if wanted != at => {
                Err(format!("the overlay takes {} to {at}, but it is on {wanted}", to.describe()))
            }
            (_, Some(at)) => Ok(format!(", through the tunnel to {at} ({tunnel})")),
            (_, None) => {
                Err(format!("the overlay takes {} to {tunnel}, which is no node's address", to.describe()))
            }
        }
    }

    /// A node on the same link is a router to its pods.
    fn router(&self, gateway: IpAddr) -> String {
        match super::ends::node_at(&self.nodes, gateway) {
            Some(node) => format!(", over the link to {node} ({gateway})"),
            None => format!(" via {gateway}"),
        }
    }

    /// On the node of the destination: the packet is handed on, and a process takes it.
    fn delivered(&mut self, node: &NodeHandle, path: &Path, to: &Destination) -> anyhow::Result<bool> {
        let object = to.pod.as_ref().map(|(pod, _)| format!("Pod {pod}"));
        let away = path.way == Way::None || path.tunnel.is_some() || path.missing.is_some();
        if away || (path.way == Way::Device && !path.running) {
            let device = path.device.as_deref().unwrap_or("nowhere");
            let says = format!("{} should be here, and the route to it leads to {device}", to.key.address);
            self.report.push(Step::fail("deliver", says).on(&node.name).by(object));
            return Ok(false);
        }
        let pod_uid = to.pod.as_ref().filter(|_| !to.host_network).and_then(|(_, uid)| uid.clone());
        if to.pod.is_some() && !to.host_network && pod_uid.is_none() {
            return Ok(true);
        }
        let BackendKeyed { address, port, protocol } = to.key;
        let request = Request::Listening(Listener { pod_uid, address, port, protocol });
        let listening: Listening = node.ask(&request)?;
        let who = to.pod.as_ref().map_or_else(|| "the node".to_owned(), |(pod, _)| format!("pod {pod}"));
        let at = format!("{port}/{protocol}");
        let step = match listening {
            Listening::Yes => Step::ok("listen", format!("a process of {who} listens at {at}")),
            Listening::No => Step::fail("listen", format!("no process of {who} listens at {at}")),
            Listening::Elsewhere => Step::fail(
                "listen",
                format!("{who} listens at {at} on another address only, such as loopback"),
            ),
            Listening::Unknown => {
                Step::note("listen", format!("whether {who} listens at {at} can't be told"))
            }
        };
        self.report.push(step.on(&node.name).by(object));
        Ok([Listening::Yes, Listening::Unknown].contains(&listening))
    }

    fn back(&mut self, node: &NodeHandle, path: &Path) -> bool {
        let device = path.device.as_deref().unwrap_or("?");
        let fail = |says: String| Step::fail("return", says).on(&node.name);
        let tunnel = path.tunnel.map(|tunnel| {
            let at = super::ends::node_at(&self.nodes, tunnel).unwrap_or_else(|| "no known node".to_owned());
            format!(", through the tunnel to {at} ({tunnel})")
        });
        let over = tunnel.or_else(|| path.gateway.map(|gateway| self.router(gateway)));
        let step = match (path.way, &path.missing) {
            (Way::None, _) => fail(format!("no route for the answer to {}", path.to)),
            (_, Some(missing)) => {
                fail(format!("the answer to {} goes into the overlay, but there is {missing}", path.to))
            }
            (Way::Device, None) if !path.running => {
                fail(format!("the answer to {} leaves by {device}, which carries no packets", path.to))
            }
            (Way::Local, None) => Step::ok("return", format!("the answer to {} stays on the node", path.to)),
            (Way::Device, None) => Step::ok(
                "return",
                format!("the answer to {} by {device}{}", path.to, over.unwrap_or_default()),
            ),
        };
        let works = step.verdict != super::report::Verdict::Fail;
        self.report.push(step.on(&node.name));
        works
    }

    /// Whether packets as large as the client's device takes pass both ways.
    fn size(&mut self, sender: Sender<'_>, there: &Path, back: &Path) -> anyhow::Result<()> {
        let (Some(out), Some(home)) = (there.mtu_bytes, back.mtu_bytes) else { return Ok(()) };
        let least = out.min(home);
        let own = match sender.pod {
            Some(address) => path(sender.node, address)?.mtu_bytes,
            None => None,
        };
        let step = match own {
            Some(own) if own > least => {
                let says = format!(
                    "{least} bytes pass, and the client's device sends {own}: it must learn of the smaller size by ICMP"
                );
                Step::note("mtu", says)
            }
            _ => Step::ok("mtu", format!("packets of {least} bytes pass both ways")),
        };
        self.report.push(step);
        Ok(())
    }
}

fn path(node: &NodeHandle, to: IpAddr) -> anyhow::Result<Path> {
    node.ask(&Request::Path { to })
}
