//! Owns authorization: `system:masters`, the node authorizer, RBAC; and what a refusal says.

mod node;
mod rbac;

pub(crate) use rbac::{Rbac, Rule, rules_of};

use crate::cache::Cache;
use crate::identity::{MASTERS, User};
use crate::request_info::RequestInfo;
use std::sync::Arc;

/// What somebody wants to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attributes {
    /// get, list, watch, create, update, patch, delete, …
    pub(crate) verb: String,
    /// API group.
    pub(crate) group: String,
    /// Plural of the resource.
    pub(crate) resource: String,
    /// Subresource, if any.
    pub(crate) subresource: String,
    /// Namespace; empty at cluster scope.
    pub(crate) namespace: String,
    /// Object, if one is named.
    pub(crate) name: String,
    /// The path, if no resource is asked for.
    pub(crate) path: String,
    /// Whether a resource is asked for.
    pub(crate) is_resource: bool,
    /// The field selector, as it came.
    pub(crate) field_selector: String,
}

/// What the authorizers say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// It may be done.
    Allow(String),
    /// It may not; with a reason, if there is one to tell.
    Deny(String),
}

impl Attributes {
    /// What a request wants to do.
    pub(crate) fn of(info: &RequestInfo, field_selector: Option<&str>) -> Self {
        Self {
            verb: info.verb.clone(),
            group: info.group.clone(),
            resource: info.resource.clone(),
            subresource: info.subresource.clone(),
            namespace: info.namespace.clone(),
            name: info.name.clone(),
            path: info.path.clone(),
            is_resource: info.is_resource,
            field_selector: field_selector.unwrap_or_default().to_owned(),
        }
    }

    /// The resource with its subresource.
    pub(crate) fn full_resource(&self) -> String {
        if self.subresource.is_empty() {
            self.resource.clone()
        } else {
            format!("{}/{}", self.resource, self.subresource)
        }
    }
}

/// All authorizers in their order.
pub(crate) struct Authorizer {
    rbac: Rbac,
    nodes: node::NodeAuthorizer,
}

impl Authorizer {
    /// Authorizers that read policy from the cache.
    pub(crate) fn new(cache: &Arc<Cache>) -> Self {
        Self { rbac: Rbac::new(cache.clone()), nodes: node::NodeAuthorizer::new(cache.clone()) }
    }

    /// RBAC, for those who ask for rules.
    pub(crate) fn rbac(&self) -> &Rbac {
        &self.rbac
    }

    /// Whether the user may.
    pub(crate) fn authorize(&self, user: &User, what: &Attributes) -> Decision {
        if user.in_group(MASTERS) {
            return Decision::Allow(String::new());
        }
        let mut reason = String::new();
        if let Some(node) = user.as_node() {
            match self.nodes.authorize(node, what) {
                Decision::Allow(why) => return Decision::Allow(why),
                Decision::Deny(why) => reason = why,
            }
        }
        match self.rbac.authorize(user, what) {
            Decision::Allow(why) => Decision::Allow(why),
            Decision::Deny(_) => Decision::Deny(reason),
        }
    }
}

/// What upstream tells somebody who may not, after `… is forbidden: `.
pub(crate) fn refusal(user: &User, what: &Attributes, reason: &str) -> String {
    let name = &user.name;
    let mut text = if what.is_resource {
        let scope = if what.namespace.is_empty() {
            "at the cluster scope".to_owned()
        } else {
            format!("in the namespace \"{}\"", what.namespace)
        };
        format!(
            "User \"{name}\" cannot {} resource \"{}\" in API group \"{}\" {scope}",
            what.verb,
            what.full_resource(),
            what.group
        )
    } else {
        format!("User \"{name}\" cannot {} path \"{}\"", what.verb, what.path)
    };
    if !reason.is_empty() {
        text.push_str(": ");
        text.push_str(reason);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_read_as_upstreams() {
        let user = User::new("x", &[]);
        let mut what = Attributes {
            verb: "list".into(),
            resource: "pods".into(),
            namespace: "default".into(),
            is_resource: true,
            ..Attributes::default()
        };
        assert_eq!(
            refusal(&user, &what, ""),
            r#"User "x" cannot list resource "pods" in API group "" in the namespace "default""#
        );
        what.namespace.clear();
        what.subresource = "exec".into();
        assert_eq!(
            refusal(&user, &what, "why"),
            r#"User "x" cannot list resource "pods/exec" in API group "" at the cluster scope: why"#
        );
    }
}
