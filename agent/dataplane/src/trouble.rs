//! Tells of Services that can't be programmed on this node and of nodes that don't answer it, as Events on them; and of what the node
//! finds out about the network under it, as Events on itself.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Service};
use kube::api::ListParams;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource as _};
use tokio::sync::mpsc;

use crate::ejection;
use crate::peers::Turn;
use crate::tables::ServiceName;

/// A Service, and why it is not as it should be.
pub(crate) type Trouble = (ServiceName, String);

/// A Service, and which of its backends is ejected or comes back.
pub(crate) type Ejection = (ServiceName, ejection::Turn);

/// What the node found out about the network that joins it with the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// The way to a node is narrower than it begins, or no longer.
    Width {
        /// The node, and its address.
        node: Arc<str>,
        address: IpAddr,
        /// The largest packet that gets there, if it is narrow.
        takes_bytes: Option<u32>,
    },
    /// The card breaks checksums within tunnels, as a node could tell, or no packets go by it any more.
    Checksums {
        /// Who could tell.
        broken: Option<Arc<str>>,
    },
}

/// Tells of all that come; it ends only with the senders.
pub(crate) async fn tell(
    client: Client,
    node: &str,
    mut troubles: mpsc::Receiver<Trouble>,
    mut turns: mpsc::Receiver<Turn>,
    mut ejections: mpsc::Receiver<Ejection>,
    mut findings: mpsc::Receiver<Finding>,
) {
    let reporter = Reporter { controller: "weft-proxy".to_owned(), instance: Some(node.to_owned()) };
    let teller = Teller { recorder: Recorder::new(client.clone(), reporter), client, node };
    loop {
        let (about, told) = tokio::select! {
            Some(trouble) = troubles.recv() => (trouble.0.to_string(), teller.trouble(&trouble).await),
            Some(turn) = turns.recv() => (turn.node.to_string(), teller.turn(&turn).await),
            Some(ejection) = ejections.recv() => (ejection.0.to_string(), teller.ejection(&ejection).await),
            Some(finding) = findings.recv() => (node.to_owned(), teller.finding(&finding).await),
            else => return,
        };
        if let Err(error) = told {
            tracing::warn!(about, %error, "cannot tell of it by an Event");
        }
    }
}

struct Teller<'a> {
    client: Client,
    recorder: Recorder,
    node: &'a str,
}

impl Teller<'_> {
    async fn trouble(&self, (service, reason): &Trouble) -> Result<(), kube::Error> {
        let event = Event {
            type_: EventType::Warning,
            reason: "FailedToProgram".to_owned(),
            note: Some(format!("node {}: {reason}; it is retried", self.node)),
            action: "Programming".to_owned(),
            secondary: None,
        };
        match find(&self.client, service).await? {
            Some(reference) => self.recorder.publish(&event, &reference).await,
            None => Ok(()),
        }
    }

    async fn ejection(&self, (service, turn): &Ejection) -> Result<(), kube::Error> {
        let backend = SocketAddr::new(turn.backend.address.into(), turn.backend.port.get());
        let (type_, reason, note) = match turn.seconds {
            Some(seconds) => (
                EventType::Warning,
                "EndpointEjected",
                format!(
                    "node {}: connections to {backend} failed, it is left out for {seconds} s \
                     (never more than half of the endpoints are)",
                    self.node
                ),
            ),
            None => (
                EventType::Normal,
                "EndpointReturned",
                format!("node {}: {backend} is tried again", self.node),
            ),
        };
        let (reason, action) = (reason.to_owned(), "Ejecting".to_owned());
        let event = Event { type_, reason, note: Some(note), action, secondary: None };
        match find(&self.client, service).await? {
            Some(reference) => self.recorder.publish(&event, &reference).await,
            None => Ok(()),
        }
    }

    async fn turn(&self, turn: &Turn) -> Result<(), kube::Error> {
        let (own, Turn { node, address, silent }) = (self.node, turn);
        let (type_, reason, note) = match silent {
            true => (
                EventType::Warning,
                "NodeUnreachable",
                format!("Node {node} ({address}) does not answer {own}: its endpoints are left out there"),
            ),
            false => (
                EventType::Normal,
                "NodeReachable",
                format!("Node {node} ({address}) answers {own} again: its endpoints are used there"),
            ),
        };
        let (reason, action) = (reason.to_owned(), "Watching".to_owned());
        let event = Event { type_, reason, note: Some(note), action, secondary: None };
        self.of_node(node, &event).await
    }

    async fn finding(&self, finding: &Finding) -> Result<(), kube::Error> {
        let (type_, reason, note) = match finding {
            Finding::Width { node, address, takes_bytes: Some(bytes) } => (
                EventType::Warning,
                "NarrowPath",
                format!(
                    "No packets of more than {bytes} bytes get to node {node} ({address}), though the link takes them: pods are told"
                ),
            ),
            Finding::Width { node, address, takes_bytes: None } => (
                EventType::Normal,
                "PathWidened",
                format!("All packets that the link takes get to node {node} ({address})"),
            ),
            Finding::Checksums { broken: Some(node) } => (
                EventType::Warning,
                "ChecksumOffloadBroken",
                format!(
                    "Datagrams that the network card finishes the checksums of don't get to node {node} through the tunnel, others do: \
                     nothing is left to the card there any more"
                ),
            ),
            Finding::Checksums { broken: None } => (
                EventType::Normal,
                "ChecksumOffloadUsed",
                "Checksums within tunnels are left to the network card again".to_owned(),
            ),
        };
        let (reason, action) = (reason.to_owned(), "Measuring".to_owned());
        self.of_node(self.node, &Event { type_, reason, note: Some(note), action, secondary: None }).await
    }

    /// Makes it an Event of a Node, unless that is gone.
    async fn of_node(&self, node: &str, event: &Event) -> Result<(), kube::Error> {
        let api: Api<Node> = Api::all(self.client.clone());
        match api.get_opt(node).await? {
            Some(object) => self.recorder.publish(event, &object.object_ref(&())).await,
            None => Ok(()),
        }
    }
}

/// The Service as an Event refers to it; `None` if it is gone. It is listed because a proxy's role allows no more.
async fn find(client: &Client, service: &ServiceName) -> Result<Option<ObjectReference>, kube::Error> {
    let api: Api<Service> = Api::namespaced(client.clone(), service.namespace());
    let only = ListParams::default().fields(&format!("metadata.name={}", service.name()));
    let found = api.list(&only).await?;
    let object = found.items.into_iter().find(|s| s.metadata.name.as_deref() == Some(service.name()));
    Ok(object.map(|object| object.object_ref(&())))
}
