//! Owns what is answered but not stored: reviews of tokens, access and rules, and bindings.

use crate::authz::{Attributes, Decision};
use crate::body::{Body, Response};
use crate::identity::User;
use crate::registry::{self, Call, options::WriteOptions};
use crate::reply;
use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use weft_control_api::status::Status;

/// Answers a request for a kind that isn't stored.
pub(crate) async fn answer(call: &Call, body: Body) -> Result<Response, Status> {
    if call.kind.kind == "ComponentStatus" {
        return component_statuses(call);
    }
    let named = !call.info.name.is_empty() || !call.info.subresource.is_empty();
    if call.head.method != Method::POST || named {
        return Err(Status::method_not_allowed());
    }
    let options = WriteOptions::of(&call.query)?;
    let body = call.read(body).await?;
    let decoded = call.decode(&body, &options)?;
    let mut object = decoded.object;
    match call.kind.kind {
        "TokenReview" => token(call, &mut object),
        "SubjectAccessReview" | "LocalSubjectAccessReview" => access(call, &mut object)?,
        "SelfSubjectAccessReview" => {
            let what = attributes(&object["spec"])?;
            object["status"] = decision(call, &call.user, &what);
        }
        "SelfSubjectRulesReview" => rules(call, &mut object),
        "SelfSubjectReview" => object["status"] = json!({"userInfo": user_info(&call.user)}),
        "Binding" => return registry::bind(call, &object, &options).await,
        _ => return Err(Status::method_not_allowed()),
    }
    if !object["metadata"].is_object() {
        object["metadata"] = json!({});
    }
    let mut response = reply::json(StatusCode::CREATED, Bytes::from(object.to_string()));
    reply::warn(response.headers_mut(), &decoded.warnings);
    Ok(response)
}

fn component_statuses(call: &Call) -> Result<Response, Status> {
    if call.head.method != Method::GET {
        return Err(Status::method_not_allowed());
    }
    if !call.info.name.is_empty() {
        return Err(call.not_found());
    }
    let list = json!({"kind": "ComponentStatusList", "apiVersion": "v1", "metadata": {}, "items": []});
    Ok(reply::json(StatusCode::OK, Bytes::from(list.to_string())))
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
}

fn user_info(user: &User) -> Value {
    let mut info = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        info["uid"] = json!(user.uid);
    }
    if !user.extra.is_empty() {
        info["extra"] = json!(user.extra);
    }
    info
}

fn token(call: &Call, review: &mut Value) {
    let audiences = strings(&review["spec"]["audiences"]);
    let token = review["spec"]["token"].as_str().unwrap_or_default();
    let wanted = (!audiences.is_empty()).then_some(audiences.as_slice());
    review["status"] = match call.api.tokens.authenticate(token, wanted) {
        Ok((user, audiences)) => {
            json!({"authenticated": true, "user": user_info(&user), "audiences": audiences})
        }
        Err(error) => json!({"user": {}, "error": format!("[invalid bearer token, {error}]")}),
    };
}

fn attributes(spec: &Value) -> Result<Attributes, Status> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (resource, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    match (resource.is_object(), path.is_object()) {
        (true, false) => Ok(Attributes {
            verb: text(&resource["verb"]),
            group: text(&resource["group"]),
            resource: text(&resource["resource"]),
            subresource: text(&resource["subresource"]),
            namespace: text(&resource["namespace"]),
            name: text(&resource["name"]),
            is_resource: true,
            field_selector: text(&resource["fieldSelector"]["rawSelector"]),
            path: String::new(),
        }),
        (false, true) => {
            Ok(Attributes { verb: text(&path["verb"]), path: text(&path["path"]), ..Attributes::default() })
        }
        _ => Err(Status::bad_request(
            "spec: Invalid value: exactly one of nonResourceAttributes or resourceAttributes must be specified",
        )),
    }
}

fn decision(call: &Call, user: &User, what: &Attributes) -> Value {
    match call.api.authorizer.authorize(user, what) {
        Decision::Allow(reason) if reason.is_empty() => json!({"allowed": true}),
        Decision::Allow(reason) => json!({"allowed": true, "reason": reason}),
        Decision::Deny(reason) if reason.is_empty() => json!({"allowed": false}),
        Decision::Deny(reason) => json!({"allowed": false, "reason": reason}),
    }
}

fn access(call: &Call, review: &mut Value) -> Result<(), Status> {
    let spec = &review["spec"];
    let what = attributes(spec)?;
    if call.kind.kind == "LocalSubjectAccessReview" && what.namespace != call.info.namespace {
        return Err(Status::bad_request(
            "spec.resourceAttributes.namespace: Invalid value: must match metadata.namespace",
        ));
    }
    let mut extra = BTreeMap::new();
    for (key, values) in spec["extra"].as_object().into_iter().flatten() {
        extra.insert(key.clone(), strings(values));
    }
    let user = User {
        name: spec["user"].as_str().unwrap_or_default().to_owned(),
        uid: spec["uid"].as_str().unwrap_or_default().to_owned(),
        groups: strings(&spec["groups"]),
        extra,
    };
    if user.name.is_empty() && user.groups.is_empty() {
        return Err(Status::bad_request(
            "spec: Invalid value: at least one of user or group must be specified",
        ));
    }
    review["status"] = decision(call, &user, &what);
    Ok(())
}

fn rules(call: &Call, review: &mut Value) {
    let namespace = review["spec"]["namespace"].as_str().unwrap_or_default();
    let mut rules = call.api.authorizer.rbac().rules(&call.user, namespace);
    if call.user.in_group(crate::identity::MASTERS) {
        let all = vec!["*".to_owned()];
        rules.push(crate::authz::Rule {
            verbs: all.clone(),
            api_groups: all.clone(),
            resources: all.clone(),
            ..Default::default()
        });
        rules.push(crate::authz::Rule { verbs: all.clone(), non_resource_urls: all, ..Default::default() });
    }
    let (mut resources, mut paths) = (Vec::new(), Vec::new());
    for rule in rules {
        if !rule.resources.is_empty() {
            let mut one =
                json!({"verbs": rule.verbs, "apiGroups": rule.api_groups, "resources": rule.resources});
            if !rule.resource_names.is_empty() {
                one["resourceNames"] = json!(rule.resource_names);
            }
            resources.push(one);
        } else if !rule.non_resource_urls.is_empty() {
            paths.push(json!({"verbs": rule.verbs, "nonResourceURLs": rule.non_resource_urls}));
        }
    }
    review["status"] = json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false});
}
