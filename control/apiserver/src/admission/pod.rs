//! Owns what admission gives a new pod: a service account and its token, tolerations, a priority.

use super::{Operation, Review};
use crate::cache::Item;
use serde_json::{Value, json};
use std::sync::Arc;
use weft_control_api::status::{Details, Status};

/// Where a pod finds its token.
const TOKEN_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Seconds that a pod's token is good; kubelets renew it earlier.
const TOKEN_SECONDS: i64 = 3607;
/// Seconds that a pod stays on a node that is not ready or not reachable.
const TOLERATION_SECONDS: i64 = 300;
/// A pod that a kubelet made of a file.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// Reviews a pod.
pub(super) fn mutate(review: &Review<'_>, pod: &mut Value, old: Option<&Value>) -> Result<(), Status> {
    if let Some(old) = old {
        keep(pod, old);
        return Ok(());
    }
    if review.operation == Operation::Create {
        service_account(review, pod)?;
        default_tolerations(pod);
        priority(review, pod)?;
    }
    Ok(())
}

/// An update that was written against the manifest leaves what admission has set.
fn keep(pod: &mut Value, old: &Value) {
    for key in ["priority", "preemptionPolicy"] {
        if pod["spec"][key].is_null() && !old["spec"][key].is_null() {
            pod["spec"][key] = old["spec"][key].clone();
        }
    }
}

fn service_account(review: &Review<'_>, pod: &mut Value) -> Result<(), Status> {
    if !pod["metadata"]["annotations"][MIRROR].is_null() {
        return mirror(review, pod);
    }
    let spec = &mut pod["spec"];
    if spec["serviceAccountName"].as_str().unwrap_or_default().is_empty() {
        spec["serviceAccountName"] = json!("default");
        spec["serviceAccount"] = json!("default");
    }
    let name = spec["serviceAccountName"].as_str().unwrap_or_default().to_owned();
    let account = account(review, &name).ok_or_else(|| missing(review, &name))?.parse();
    let mount = spec["automountServiceAccountToken"]
        .as_bool()
        .or_else(|| account["automountServiceAccountToken"].as_bool())
        .unwrap_or(true);
    if mount {
        mount_token(spec);
    }
    let secrets = account["imagePullSecrets"].as_array().filter(|list| !list.is_empty());
    if let (Some(secrets), true) = (secrets, is_empty(&spec["imagePullSecrets"])) {
        spec["imagePullSecrets"] = json!(secrets);
    }
    Ok(())
}

fn is_empty(list: &Value) -> bool {
    list.as_array().is_none_or(Vec::is_empty)
}

fn account(review: &Review<'_>, name: &str) -> Option<Arc<Item>> {
    review.api.cached("", "serviceaccounts", review.namespace, name)
}

fn missing(review: &Review<'_>, name: &str) -> Status {
    let mut status = review.forbidden(&format!(
        "error looking up service account {}/{name}: serviceaccount \"{name}\" not found",
        review.namespace
    ));
    // Controllers try again: the account of a new namespace is made a moment after it.
    if let Some(details) = status.details.as_mut() {
        **details = Details { kind: "pods".to_owned(), name: review.name.to_owned(), ..Details::default() };
    }
    status
}

fn mirror(review: &Review<'_>, pod: &Value) -> Result<(), Status> {
    let named = pod["spec"]["serviceAccountName"].as_str().is_some_and(|name| !name.is_empty());
    if named {
        return Err(review.forbidden("a mirror pod may not reference service accounts"));
    }
    let volumes = pod["spec"]["volumes"].as_array().into_iter().flatten();
    for volume in volumes {
        for kind in ["secret", "configMap", "persistentVolumeClaim", "projected"] {
            if !volume[kind].is_null() {
                return Err(review.forbidden(&format!("a mirror pod may not reference {kind}s")));
            }
        }
    }
    Ok(())
}

fn mount_token(spec: &mut Value) {
    let mut used = false;
    let volume = format!("kube-api-access-{}", crate::registry::random_suffix());
    for key in ["initContainers", "containers"] {
        for container in spec[key].as_array_mut().into_iter().flatten() {
            let mounts = container["volumeMounts"].as_array();
            if mounts.into_iter().flatten().any(|mount| mount["mountPath"] == TOKEN_PATH) {
                continue;
            }
            used = true;
            let mount = json!({"name": volume, "readOnly": true, "mountPath": TOKEN_PATH});
            push(container, "volumeMounts", mount);
        }
    }
    if used {
        push(
            spec,
            "volumes",
            json!({"name": volume, "projected": {"defaultMode": 420, "sources": [
                {"serviceAccountToken": {"expirationSeconds": TOKEN_SECONDS, "path": "token"}},
                {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
                {"downwardAPI": {"items": [{"path": "namespace",
                    "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
            ]}}),
        );
    }
}

fn push(object: &mut Value, key: &str, value: Value) {
    match object[key].as_array_mut() {
        Some(list) => list.push(value),
        None => object[key] = json!([value]),
    }
}

fn default_tolerations(pod: &mut Value) {
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = pod["spec"]["tolerations"].as_array().into_iter().flatten().any(|toleration| {
            let text = |field: &str| toleration[field].as_str().unwrap_or_default();
            (text("key") == key || text("key").is_empty())
                && (text("effect") == "NoExecute" || text("effect").is_empty())
        });
        if !tolerated {
            push(
                &mut pod["spec"],
                "tolerations",
                json!({"key": key, "operator": "Exists",
                "effect": "NoExecute", "tolerationSeconds": TOLERATION_SECONDS}),
            );
        }
    }
}

fn priority(review: &Review<'_>, pod: &mut Value) -> Result<(), Status> {
    let api = review.api;
    let named = pod["spec"]["priorityClassName"].as_str().unwrap_or_default().to_owned();
    let class = if named.is_empty() {
        let default = api.resources.by_plural("scheduling.k8s.io", "priorityclasses").and_then(|classes| {
            let objects = api.cache.snapshot(classes.id).objects;
            let defaults =
                objects.values().map(|item| item.parse()).filter(|class| class["globalDefault"] == true);
            defaults.min_by_key(|class| class["value"].as_i64())
        });
        if let Some(class) = &default {
            pod["spec"]["priorityClassName"] = class["metadata"]["name"].clone();
        }
        default
    } else {
        let item = api.cached("scheduling.k8s.io", "priorityclasses", "", &named);
        let item =
            item.ok_or_else(|| review.forbidden(&format!("no PriorityClass with name {named} was found")))?;
        Some(item.parse())
    };
    let value = class.as_ref().and_then(|class| class["value"].as_i64()).unwrap_or(0);
    let policy = class
        .as_ref()
        .and_then(|class| class["preemptionPolicy"].as_str())
        .unwrap_or("PreemptLowerPriority")
        .to_owned();
    if let Some(given) = pod["spec"]["priority"].as_i64()
        && given != value
    {
        return Err(review.forbidden(&format!(
            "the integer value of priority ({given}) must not be provided in pod spec; priority admission \
             controller computed {value} from the given PriorityClass name"
        )));
    }
    pod["spec"]["priority"] = json!(value);
    if pod["spec"]["preemptionPolicy"].is_null() {
        pod["spec"]["preemptionPolicy"] = json!(policy);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tolerations_are_added_once() {
        let mut pod =
            json!({"spec": {"tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}]}});
        default_tolerations(&mut pod);
        default_tolerations(&mut pod);
        assert_eq!(pod["spec"]["tolerations"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn a_token_is_mounted_where_nothing_is() {
        let mut spec = json!({"containers": [{"name": "a"},
            {"name": "b", "volumeMounts": [{"name": "own", "mountPath": TOKEN_PATH}]}]});
        mount_token(&mut spec);
        assert_eq!(spec["volumes"].as_array().unwrap().len(), 1);
        assert_eq!(spec["containers"][0]["volumeMounts"][0]["mountPath"], TOKEN_PATH);
        assert_eq!(spec["containers"][1]["volumeMounts"].as_array().unwrap().len(), 1);
    }
}
