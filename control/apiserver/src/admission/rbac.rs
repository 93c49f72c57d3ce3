//! Owns the rule that nobody grants what they don't have: roles and bindings are checked against their author.

use super::{Operation, Review};
use crate::authz::{Attributes, Decision, Rule, rules_of};
use crate::identity::MASTERS;
use serde_json::Value;
use weft_control_api::status::Status;

const GROUP: &str = "rbac.authorization.k8s.io";

/// Refuses roles and bindings that grant more than their author has.
pub(super) fn escalation(
    review: &Review<'_>,
    object: Option<&Value>,
    old: Option<&Value>,
) -> Result<(), Status> {
    let Some(object) = object else { return Ok(()) };
    if review.kind.group != GROUP || review.operation == Operation::Delete || review.user.in_group(MASTERS) {
        return Ok(());
    }
    let role = matches!(review.kind.kind, "Role" | "ClusterRole");
    let fields: &[&str] = if role { &["rules", "aggregationRule"] } else { &["subjects", "roleRef"] };
    if old.is_some_and(|old| fields.iter().all(|field| old[*field] == object[*field])) {
        return Ok(());
    }
    let verb = if role { "escalate" } else { "bind" };
    if may(review, verb, object) {
        return Ok(());
    }
    let rbac = review.api.authorizer.rbac();
    let wanted = if role {
        if !object["aggregationRule"].is_null() {
            return Err(review.forbidden("must have cluster-admin privileges to use an aggregationRule"));
        }
        rules_of(object)
    } else {
        rbac.rules_of_ref(&object["roleRef"], review.namespace).ok_or_else(|| {
            let kind = object["roleRef"]["kind"].as_str().unwrap_or_default().to_lowercase();
            let name = object["roleRef"]["name"].as_str().unwrap_or_default();
            review.forbidden(&format!("{kind}s.{GROUP} \"{name}\" not found"))
        })?
    };
    let held = rbac.rules(review.user, review.namespace);
    let missing: Vec<String> = wanted.iter().filter(|rule| !rule.covered_by(&held)).map(describe).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(review.forbidden(&format!(
        "user \"{}\" (groups={:?}) is attempting to grant RBAC permissions not currently held:\n{}",
        review.user.name,
        review.user.groups,
        missing.join("\n")
    )))
}

fn may(review: &Review<'_>, verb: &str, object: &Value) -> bool {
    let (resource, name, namespace) = if verb == "bind" {
        let cluster = object["roleRef"]["kind"] == "ClusterRole";
        let name = object["roleRef"]["name"].as_str().unwrap_or_default();
        (if cluster { "clusterroles" } else { "roles" }, name, review.namespace)
    } else {
        (review.kind.plural, review.name, review.namespace)
    };
    let what = Attributes {
        verb: verb.to_owned(),
        group: GROUP.to_owned(),
        resource: resource.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        is_resource: true,
        ..Attributes::default()
    };
    matches!(review.api.authorizer.authorize(review.user, &what), Decision::Allow(_))
}

fn describe(rule: &Rule) -> String {
    let mut parts = Vec::new();
    let rows = [
        ("APIGroups", &rule.api_groups),
        ("Resources", &rule.resources),
        ("ResourceNames", &rule.resource_names),
        ("NonResourceURLs", &rule.non_resource_urls),
        ("Verbs", &rule.verbs),
    ];
    for (name, list) in rows {
        if !list.is_empty() {
            parts.push(format!("{name}:{list:?}"));
        }
    }
    format!("{{{}}}", parts.join(", "))
}
