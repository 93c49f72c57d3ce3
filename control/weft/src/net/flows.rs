//! `weft flows`: what happens to connections, on every node, as it happens.

mod names;

use std::io::Write as _;

use anyhow::bail;
use serde::Serialize;
use tokio::sync::mpsc;
use weft_agent_dataplane::observe::flows::{Flow, FlowKind, Seen};
use weft_agent_dataplane::observe::wire::Protocol;

use super::Said;
use super::args::{FlowsArgs, Output};
use super::reach::{NodeHandle, Reach};
use names::{Named, Names};

/// Flows that wait to be written. A slow terminal makes the nodes count lost events instead of this process grow.
const MAX_WAITING: usize = 1_024;

/// A flow with the names of its ends.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    time: String,
    node: String,
    kind: FlowKind,
    protocol: Protocol,
    source: Named,
    destination: Named,
    #[serde(skip_serializing_if = "Option::is_none")]
    backend: Option<Named>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// What is asked for.
struct Filter {
    pod: Option<String>,
    service: Option<String>,
}

/// `weft flows`: ends when the reader does, after `--count` flows, or when no node tells any more.
pub(crate) async fn flows(reach: &Reach, args: &FlowsArgs) -> anyhow::Result<Said> {
    let full = |name: &String| {
        if name.contains('/') { name.clone() } else { format!("{}/{name}", args.namespace) }
    };
    let filter = Filter { pod: args.pod.as_ref().map(full), service: args.service.as_ref().map(full) };
    let (sender, mut seen) = mpsc::channel(MAX_WAITING);
    let mut nodes = 0;
    for node in reach.nodes.iter().filter(|node| args.node.as_ref().is_none_or(|name| *name == node.name)) {
        nodes += 1;
        watch(node, args.drops, sender.clone()).await?;
    }
    drop(sender);
    if nodes == 0 {
        bail!("node {} is not on this machine", args.node.as_deref().unwrap_or("?"));
    }
    let (mut names, mut written, mut watching) = (Names::new(reach), 0, std::collections::BTreeSet::new());
    while let Some((node, seen)) = seen.recv().await {
        match seen {
            Seen::Watching => {
                if watching.insert(node) && watching.len() == nodes {
                    eprintln!("watching {nodes} node(s)");
                }
            }
            Seen::Lost(count) => eprintln!("{node}: {count} events were lost"),
            Seen::Failed(error) => eprintln!("{node}: {error}"),
            Seen::Flow(flow) => {
                let shown = named(&mut names, node, &flow).await?;
                if !filter.takes(&shown) {
                    continue;
                }
                if !write(&shown, args.output)? {
                    break;
                }
                written += 1;
                if args.count == Some(written) {
                    break;
                }
            }
        }
    }
    Ok(Said { text: String::new(), yes: true })
}

async fn watch(
    node: &NodeHandle,
    drops_only: bool,
    sender: mpsc::Sender<(String, Seen)>,
) -> anyhow::Result<()> {
    let mut watch = node.watch(drops_only).await?;
    let name = node.name.clone();
    tokio::spawn(async move {
        loop {
            let seen = match watch.next().await {
                Ok(Some(seen)) => seen,
                Ok(None) => Seen::Failed("its agent has ended".to_owned()),
                Err(error) => Seen::Failed(weft_agent_runtime::chain(&error)),
            };
            let ended = matches!(&seen, Seen::Failed(error) if error.contains("has ended"));
            if sender.send((name.clone(), seen)).await.is_err() || ended {
                return;
            }
        }
    });
    Ok(())
}

async fn named(names: &mut Names<'_>, node: String, flow: &Flow) -> anyhow::Result<Shown> {
    names.learn(flow).await?;
    let source = match (&flow.pod_uid, flow.source) {
        (Some(uid), _) => Named { pod: names.pod_of(uid), ..Named::default() },
        (None, Some(address)) => names.end(address, flow.protocol),
        (None, None) => Named { node: Some(node.clone()), ..Named::default() },
    };
    Ok(Shown {
        time: flow.time.to_string(),
        node,
        kind: flow.kind,
        protocol: flow.protocol,
        source,
        destination: names.end(flow.destination, flow.protocol),
        backend: flow.backend.map(|backend| names.end(backend, flow.protocol)),
        reason: flow.reason.clone(),
    })
}

impl Filter {
    fn takes(&self, shown: &Shown) -> bool {
        let ends = [Some(&shown.source), Some(&shown.destination), shown.backend.as_ref()];
        let pod = self
            .pod
            .as_ref()
            .is_none_or(|pod| ends.iter().flatten().any(|end| end.pod.as_ref() == Some(pod)));
        let service = |service: &String| shown.destination.service.as_ref() == Some(service);
        pod && self.service.as_ref().is_none_or(service)
    }
}

/// Answers whether somebody reads on.
fn write(shown: &Shown, output: Option<Output>) -> anyhow::Result<bool> {
    let line = match output {
        Some(Output::Json) => serde_json::to_string(shown)?,
        None => text(shown),
    };
    let mut out = std::io::stdout().lock();
    Ok(writeln!(out, "{line}").and_then(|()| out.flush()).is_ok())
}

fn text(shown: &Shown) -> String {
    let kind = match shown.kind {
        FlowKind::Connect => "connect",
        FlowKind::Datagram => "datagram",
        FlowKind::Packet => "packet",
        FlowKind::Drop => "drop",
    };
    // The day is the reader's own.
    let time = shown.time.split_once('T').map_or(shown.time.as_str(), |(_, time)| time);
    let time: String = time.trim_end_matches('Z').chars().take(12).collect();
    let mut line = format!(
        "{time:<12}  {}  {kind:<8}  {}  {} → {}",
        shown.node, shown.protocol, shown.source, shown.destination
    );
    if let Some(backend) = &shown.backend {
        line.push_str(&format!(" → {backend}"));
    }
    if let Some(reason) = &shown.reason {
        line.push_str(&format!("  {reason}"));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(kind: FlowKind) -> Shown {
        let end = |address: &str| Named { address: Some(address.to_owned()), ..Named::default() };
        Shown {
            time: "2026-01-02T03:04:05.678901Z".to_owned(),
            node: "node-1".to_owned(),
            kind,
            protocol: Protocol::Tcp,
            source: Named { pod: Some("default/client".to_owned()), ..Named::default() },
            destination: Named { service: Some("default/web".to_owned()), ..end("10.43.0.7:80") },
            backend: None,
            reason: Some("socket_no_endpoints".to_owned()),
        }
    }

    #[test]
    fn a_flow_is_one_line() {
        assert_eq!(
            text(&shown(FlowKind::Drop)),
            "03:04:05.678  node-1  drop      TCP  default/client → default/web (10.43.0.7:80)  socket_no_endpoints"
        );
    }

    #[test]
    fn filters_look_at_every_end() {
        let flow = shown(FlowKind::Drop);
        let filter = |pod: Option<&str>, service: Option<&str>| Filter {
            pod: pod.map(str::to_owned),
            service: service.map(str::to_owned),
        };
        assert!(filter(None, None).takes(&flow));
        assert!(filter(Some("default/client"), Some("default/web")).takes(&flow));
        assert!(!filter(Some("default/other"), None).takes(&flow));
        assert!(!filter(None, Some("default/other")).takes(&flow));
    }
}
