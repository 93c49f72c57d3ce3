//! The node's lease: renewed every ten seconds, so that the cluster knows that the node lives.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::shared::Shared;
use crate::start::api_error;

const NAMESPACE: &str = "kube-node-lease";
const DURATION_SECONDS: i32 = 40;
const RENEW: Duration = Duration::from_secs(10);
/// After a failure (the node or the namespace may not be there yet).
const RETRY: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(7);

/// Renews the lease until shutdown.
pub(crate) async fn run(shared: Arc<Shared>, stop: CancellationToken) {
    let mut delay = RETRY;
    let mut known = false;
    loop {
        let result = tokio::select! {
            () = stop.cancelled() => return,
            result = renew(&shared, known) => result,
        };
        let wait = match result {
            Ok(()) => {
                known = true;
                delay = RETRY;
                RENEW
            }
            Err(error) => {
                known = false;
                tracing::debug!(
                    node = shared.config.node_name,
                    error = api_error(&error),
                    "cannot renew the node's lease"
                );
                let wait = delay;
                delay = (delay * 2).min(RETRY_MAX);
                wait
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn renew(shared: &Shared, known: bool) -> Result<(), kube::Error> {
    let api: Api<Lease> = Api::namespaced(shared.client.clone(), NAMESPACE);
    let name = &shared.config.node_name;
    let now = clock::micros(clock::now());
    let body =
        json!({"spec": {"holderIdentity": name, "leaseDurationSeconds": DURATION_SECONDS, "renewTime": now}});
    let patched = api.patch(name, &PatchParams::default(), &Patch::Merge(body)).await;
    match patched {
        Ok(_) => return Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 && !known => {}
        Err(error) => return Err(error),
    }
    let nodes: Api<Node> = Api::all(shared.client.clone());
    let node = nodes.get(name).await?;
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(NAMESPACE.into()),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".into(),
                kind: "Node".into(),
                name: name.clone(),
                uid: node.metadata.uid.unwrap_or_default(),
                ..OwnerReference::default()
            }]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(name.clone()),
            lease_duration_seconds: Some(DURATION_SECONDS),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }),
    };
    api.create(&PostParams::default(), &lease).await.map(drop)
}
