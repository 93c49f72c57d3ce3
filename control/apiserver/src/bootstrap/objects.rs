//! Owns the writing of a cluster's first objects. Every start does it again: what is there stays, but for what
//! follows the configuration (the endpoint of the Service `kubernetes`) and for policy that grew.

use super::policy;
use crate::api::Api;
use crate::identity::{MASTERS, User};
use crate::registry::{Change, NewObject, create, update_object};
use serde_json::{Value, json};
use std::sync::Arc;
use weft_control_api::kinds::{self, Gvk, Kind};
use weft_control_api::status::Status;

/// Why the first objects couldn't be written.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The API refused one.
    #[error("{kind} {name} couldn't be written: {status}")]
    Refused {
        /// Its kind.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Why.
        status: Box<Status>,
    },
    /// The kind isn't served.
    #[error("the kind {0} is not served")]
    Kind(String),
}

/// Whether an object that is there is brought up to date.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// As it is.
    AsIs,
    /// Replace these top-level fields.
    Set(&'static [&'static str]),
    /// Add rules and subjects that are missing, unless the administrator switched that off.
    Reconcile,
    /// Add the range of a second family; the present one can't change.
    AddRange,
}

const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";

struct Writer<'a> {
    api: &'a Arc<Api>,
    user: User,
}

/// Writes what every cluster has.
pub(crate) async fn bootstrap(api: &Arc<Api>) -> Result<(), BootstrapError> {
    let writer = Writer { api, user: User::new("system:apiserver", &[MASTERS]) };
    for name in ["kube-system", "kube-public", "kube-node-lease", "default"] {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        writer.write(namespace, Keep::AsIs).await?;
    }
    // Before the Service `kubernetes`, which gets its address of it.
    writer.write(service_cidr(api), Keep::AddRange).await?;
    api.freshen().await.map_err(|status| BootstrapError::Refused {
        kind: "ServiceCIDR",
        name: "kubernetes".to_owned(),
        status: Box::new(status),
    })?;
    // All at once: the store makes a few commits of them.
    futures::future::try_join_all(objects(api).into_iter().map(|(object, keep)| writer.write(object, keep)))
        .await?;
    Ok(())
}

fn objects(api: &Api) -> Vec<(Value, Keep)> {
    let policy = policy::cluster_roles()
        .into_iter()
        .chain(policy::cluster_role_bindings())
        .chain(policy::namespaced_roles())
        .map(|object| (object, Keep::Reconcile));
    let mut all: Vec<(Value, Keep)> = policy.collect();
    all.extend(priority_classes().map(|object| (object, Keep::AsIs)));
    all.push((kubernetes_service(api), Keep::AsIs));
    all.push((endpoint_slice(api), Keep::Set(&["addressType", "endpoints", "ports"])));
    all.push((endpoints(api), Keep::Set(&["subsets"])));
    all.push((client_ca(api), Keep::Set(&["data"])));
    all
}

impl Writer<'_> {
    async fn write(&self, object: Value, keep: Keep) -> Result<(), BootstrapError> {
        let (kind, name) =
            (kind_of(&object)?, object["metadata"]["name"].as_str().unwrap_or_default().to_owned());
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let refused = |status: Status| BootstrapError::Refused {
            kind: kind.kind,
            name: name.clone(),
            status: Box::new(status),
        };
        let present = self.api.cached(kind.group, kind.plural, &namespace, &name).is_some();
        if !present {
            let new = NewObject { kind, namespace: &namespace, object: object.clone(), dry_run: false };
            match create(self.api, &self.user, new).await {
                Ok(_) => return Ok(()),
                // Another server of the cluster was faster.
                Err(status) if status.reason == "AlreadyExists" => {}
                Err(status) => return Err(refused(status)),
            }
        }
        if keep == Keep::AsIs {
            return Ok(());
        }
        let change = Change { kind, namespace: &namespace, name: &name, subresource: "", dry_run: false };
        let updated = update_object(self.api, &self.user, &change, |old| Ok(merge(old, &object, keep))).await;
        updated.map(|_written| ()).map_err(refused)
    }
}

fn kind_of(object: &Value) -> Result<&'static Kind, BootstrapError> {
    let (version, kind) =
        (object["apiVersion"].as_str().unwrap_or_default(), object["kind"].as_str().unwrap_or_default());
    let gvk = Gvk::parse(version, kind);
    kinds::by_gvk(gvk.group, gvk.version, gvk.kind).ok_or_else(|| BootstrapError::Kind(kind.to_owned()))
}

fn merge(old: &Value, wanted: &Value, keep: Keep) -> Value {
    let mut new = old.clone();
    match keep {
        Keep::AsIs => {}
        Keep::Set(fields) => {
            for field in fields {
                new[*field] = wanted[*field].clone();
            }
        }
        Keep::AddRange => {
            let (present, wanted) = (&old["spec"]["cidrs"], &wanted["spec"]["cidrs"]);
            let count = |list: &Value| list.as_array().map_or(0, Vec::len);
            if count(present) == 1 && count(wanted) == 2 && present[0] == wanted[0] {
                new["spec"]["cidrs"] = wanted.clone();
            } else if present != wanted {
                tracing::warn!(%present, %wanted, "the ServiceCIDR kubernetes keeps its ranges; they differ from the configured ones");
            }
        }
        Keep::Reconcile if old["metadata"]["annotations"][AUTOUPDATE] == "false" => {}
        Keep::Reconcile => {
            for field in ["rules", "subjects"] {
                let present = old[field].as_array().cloned().unwrap_or_default();
                let missing: Vec<Value> = wanted[field]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter(|one| !present.contains(one))
                    .cloned()
                    .collect();
                if !missing.is_empty() {
                    new[field] = json!([present, missing].concat());
                }
            }
        }
    }
    new
}

fn priority_classes() -> [Value; 2] {
    [("system-cluster-critical", 2_000_000_000), ("system-node-critical", 2_000_001_000)].map(
        |(name, value)| {
            json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name},
            "value": value, "globalDefault": false, "preemptionPolicy": "PreemptLowerPriority",
            "description": "Used for system critical pods."})
        },
    )
}

fn service_cidr(api: &Api) -> Value {
    json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": api.config.service_cidrs.iter().map(ToString::to_string).collect::<Vec<_>>()}})
}

fn kubernetes_service(api: &Api) -> Value {
    let address = api.config.kubernetes_service_ip().map(|address| address.to_string());
    json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {"type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "sessionAffinity": "None",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP",
                "targetPort": api.config.advertise_port}]}})
}

fn endpoint_slice(api: &Api) -> Value {
    let family = if api.config.advertise_address.is_ipv6() { "IPv6" } else { "IPv4" };
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": family,
        "endpoints": [{"addresses": [api.config.advertise_address.to_string()], "conditions": {"ready": true}}],
        "ports": [{"name": "https", "port": api.config.advertise_port, "protocol": "TCP"}]})
}

fn endpoints(api: &Api) -> Value {
    json!({"apiVersion": "v1", "kind": "Endpoints",
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        "subsets": [{"addresses": [{"ip": api.config.advertise_address.to_string()}],
            "ports": [{"name": "https", "port": api.config.advertise_port, "protocol": "TCP"}]}]})
}

/// Where extension servers and kubelets find the authority of client certificates.
fn client_ca(api: &Api) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "extension-apiserver-authentication", "namespace": "kube-system"},
        "data": {"client-ca-file": api.config.client_ca}})
}
