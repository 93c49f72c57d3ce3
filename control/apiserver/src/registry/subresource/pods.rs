//! Owns binding and eviction of pods.

use super::super::create::now;
use super::super::delete::{DeleteOptions, delete_object};
use super::super::update::{Change, update_object};
use super::super::{Call, options::WriteOptions};
use crate::body::{Body, Response};
use crate::cache::in_namespace;
use crate::reply;
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};
use weft_control_api::kinds;
use weft_control_api::kinds::{Gvk, Kind};
use weft_control_api::selector::LabelSelector;
use weft_control_api::status::{Cause, GroupResource, Status};

const PODS: GroupResource<'static> = GroupResource { group: "", resource: "pods" };

fn pod_kind() -> Result<&'static Kind, Status> {
    kinds::find("", "v1", "pods").ok_or_else(|| Status::internal("pods are not served"))
}

/// Puts a pod on a node: once.
pub(crate) async fn bind(call: &Call, binding: &Value, options: &WriteOptions) -> Result<Response, Status> {
    let name = match call.info.name.as_str() {
        "" => binding["metadata"]["name"].as_str().unwrap_or_default(),
        name => name,
    };
    let target = &binding["target"];
    let node = target["name"].as_str().unwrap_or_default();
    let kind = target["kind"].as_str().unwrap_or_default();
    if node.is_empty() {
        return Err(invalid_binding(name, "target.name", true));
    }
    if !kind.is_empty() && kind != "Node" {
        return Err(invalid_binding(name, "target.kind", false));
    }
    let change = Change {
        kind: pod_kind()?,
        namespace: &call.info.namespace,
        name,
        subresource: "binding",
        dry_run: options.dry_run,
    };
    update_object(&call.api, &call.user, &change, |old| {
        let mut pod = old.clone();
        if old["metadata"]["deletionTimestamp"].is_string() {
            return Err(Status::conflict(
                PODS,
                name,
                &format!("pod {name} is being deleted, cannot be assigned to a host"),
            ));
        }
        if let Some(present) = old["spec"]["nodeName"].as_str().filter(|n| !n.is_empty()) {
            let reason = format!("pod {name} is already assigned to node \"{present}\"");
            return Err(Status::conflict(PODS, name, &reason));
        }
        if let Some(uid) = binding["metadata"]["uid"].as_str().filter(|uid| !uid.is_empty()) {
            pod["metadata"]["uid"] = json!(uid);
        }
        pod["spec"]["nodeName"] = json!(node);
        for key in ["annotations", "labels"] {
            for (k, v) in binding["metadata"][key].as_object().into_iter().flatten() {
                pod["metadata"][key][k] = v.clone();
            }
        }
        scheduled(&mut pod);
        Ok(pod)
    })
    .await?;
    Ok(reply::json(
        StatusCode::CREATED,
        Bytes::from_static(
            br#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Success","code":201}"#,
        ),
    ))
}

fn scheduled(pod: &mut Value) {
    let condition =
        json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": now()});
    match pod["status"]["conditions"].as_array_mut() {
        Some(list) => {
            list.retain(|c| c["type"] != "PodScheduled");
            list.push(condition);
        }
        None => pod["status"]["conditions"] = json!([condition]),
    }
}

fn invalid_binding(name: &str, field: &str, missing: bool) -> Status {
    use weft_control_api::field::{FieldError, FieldPath};
    let path = FieldPath::new(field);
    let error = if missing {
        FieldError::required(&path, "")
    } else {
        FieldError::not_supported(&path, "", &["Node", "<empty>"])
    };
    let kind = weft_control_api::status::GroupKind { group: "", kind: "Binding" };
    Status::invalid(kind, name, vec![error])
}

/// Deletes a pod if its disruption budget allows.
pub(super) async fn evict(call: &Call, body: Body) -> Result<Response, Status> {
    let body = call.read(body).await?;
    let options = WriteOptions::of(&call.query)?;
    let eviction = Gvk { group: "policy", version: "v1", kind: "Eviction" };
    let decoded = call.decode_as(&eviction, &body, options.field_validation)?;
    call.check_path(&decoded.object)?;
    let mut delete = DeleteOptions::read(&decoded.object["deleteOptions"])?;
    delete.dry_run |= options.dry_run;
    let item = call.api.fresh(call.stored(), &call.key()).await?.ok_or_else(|| call.not_found())?;
    let pod = item.parse();
    // A pod that doesn't run, or is on its way out, disrupts nobody.
    let ended = matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed" | "Pending"))
        || pod["metadata"]["deletionTimestamp"].is_string();
    if !ended {
        spend_budget(call, &pod, delete.dry_run).await?;
    }
    delete_object(&call.api, &call.user, call.kind, (&call.info.namespace, &call.info.name), &delete).await?;
    Ok(reply::json(
        StatusCode::CREATED,
        Bytes::from_static(
            br#"{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Success","code":201}"#,
        ),
    ))
}

async fn spend_budget(call: &Call, pod: &Value, dry_run: bool) -> Result<(), Status> {
    let api = &call.api;
    let Some(budgets) = api.resources.by_plural("policy", "poddisruptionbudgets").cloned() else {
        return Ok(());
    };
    let labels = pod["metadata"]["labels"].as_object();
    let snapshot = api.cache.snapshot(budgets.id);
    let matching: Vec<Value> = in_namespace(&snapshot.objects, &call.info.namespace, None)
        .map(|item| item.parse())
        .filter(|budget| {
            LabelSelector::from_value(budget["spec"].get("selector")).is_ok_and(|s| s.matches(&labels))
        })
        .collect();
    let budget = match matching.as_slice() {
        [] => return Ok(()),
        [one] => one,
        _ => {
            return Err(Status::internal(
                "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
            ));
        }
    };
    let name = budget["metadata"]["name"].as_str().unwrap_or_default();
    let change = Change {
        kind: budgets.storage,
        namespace: &call.info.namespace,
        name,
        subresource: "status",
        dry_run,
    };
    update_object(api, &call.user, &change, |old| {
        let allowed = old["status"]["disruptionsAllowed"].as_i64().unwrap_or(0);
        if allowed <= 0 {
            return Err(over_budget(name, old));
        }
        let mut new = old.clone();
        new["status"]["disruptionsAllowed"] = json!(allowed - 1);
        new["status"]["disruptedPods"][&call.info.name] = json!(now());
        Ok(new)
    })
    .await
    .map(|_written| ())
}

fn over_budget(name: &str, budget: &Value) -> Status {
    let number = |key: &str| budget["status"][key].as_i64().unwrap_or(0);
    let mut status =
        Status::too_many_requests("Cannot evict pod as it would violate the pod's disruption budget.", 0);
    if let Some(details) = status.details.as_mut() {
        details.retry_after_seconds = None;
        details.causes.push(Cause {
            reason: "DisruptionBudget".into(),
            message: format!(
                "The disruption budget {name} needs {} healthy pods and has {} currently",
                number("desiredHealthy"),
                number("currentHealthy")
            ),
            field: String::new(),
        });
    }
    status
}
