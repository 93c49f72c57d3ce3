//! Tells of Services that can't be programmed on this node, as Events on them.

use k8s_openapi::api::core::v1::{ObjectReference, Service};
use kube::api::ListParams;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource as _};
use tokio::sync::mpsc;

use crate::tables::ServiceName;

/// A Service, and why it is not as it should be.
pub(crate) type Trouble = (ServiceName, String);

/// Tells of all that come; it ends only with the sender.
pub(crate) async fn tell(client: Client, node: &str, mut troubles: mpsc::Receiver<Trouble>) {
    let reporter = Reporter { controller: "weft-proxy".to_owned(), instance: Some(node.to_owned()) };
    let recorder = Recorder::new(client.clone(), reporter);
    while let Some((service, reason)) = troubles.recv().await {
        let event = Event {
            type_: EventType::Warning,
            reason: "FailedToProgram".to_owned(),
            note: Some(format!("node {node}: {reason}; it is retried")),
            action: "Programming".to_owned(),
            secondary: None,
        };
        let told = async {
            match find(&client, &service).await? {
                Some(reference) => recorder.publish(&event, &reference).await,
                None => Ok(()),
            }
        };
        if let Err(error) = told.await {
            tracing::warn!(%service, %error, "cannot tell of the service");
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
