//! Owns RBAC: an index of rules by subject, rebuilt when a role or binding has changed.

use super::{Attributes, Decision};
use crate::cache::{Cache, Item};
use crate::identity::User;
use arc_swap::ArcSwap;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use weft_control_api::selector::LabelSelector;

/// The group of RBAC's own kinds.
pub(crate) const GROUP: &str = "rbac.authorization.k8s.io";

/// One rule of a role.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Verbs, or `*`.
    pub(crate) verbs: Vec<String>,
    /// API groups, or `*`.
    pub(crate) api_groups: Vec<String>,
    /// Resources, `resource/subresource`, `*/subresource` or `*`.
    pub(crate) resources: Vec<String>,
    /// Names; none means all.
    pub(crate) resource_names: Vec<String>,
    /// Paths, or prefixes that end in `*`.
    pub(crate) non_resource_urls: Vec<String>,
}

type Rules = Arc<Vec<Rule>>;

#[derive(Default)]
struct Grants {
    by_user: HashMap<String, Vec<Grant>>,
    by_group: HashMap<String, Vec<Grant>>,
}

#[derive(Clone)]
struct Grant {
    rules: Rules,
    /// What SubjectAccessReview tells about it.
    origin: Arc<str>,
}

#[derive(Default)]
struct Index {
    /// The newest changes of the four resources that the index was made of.
    made_of: [u64; 4],
    cluster: Grants,
    namespaces: HashMap<String, Grants>,
    aggregated: BTreeMap<String, Vec<Rule>>,
}

/// The RBAC authorizer.
pub(crate) struct Rbac {
    cache: Arc<Cache>,
    /// Roles, cluster roles, role bindings, cluster role bindings.
    ids: Option<[usize; 4]>,
    index: ArcSwap<Index>,
}

impl Rbac {
    /// An authorizer over the cache's roles and bindings.
    pub(crate) fn new(cache: Arc<Cache>) -> Self {
        let id = |plural| cache.resources().by_plural(GROUP, plural).map(|r| r.id);
        let ids = match (id("roles"), id("clusterroles"), id("rolebindings"), id("clusterrolebindings")) {
            (Some(a), Some(b), Some(c), Some(d)) => Some([a, b, c, d]),
            _ => None,
        };
        Self {
            cache,
            ids,
            index: ArcSwap::from_pointee(Index { made_of: [u64::MAX; 4], ..Index::default() }),
        }
    }

    fn index(&self) -> Arc<Index> {
        let Some(ids) = self.ids else { return self.index.load_full() };
        let now = ids.map(|id| self.cache.newest_change(id));
        let index = self.index.load_full();
        if index.made_of == now {
            return index;
        }
        let fresh = Arc::new(Index::build(&self.cache, ids, now));
        self.index.store(fresh.clone());
        fresh
    }

    /// Whether some rule allows it.
    pub(crate) fn authorize(&self, user: &User, what: &Attributes) -> Decision {
        let index = self.index();
        let allowed = index
            .grants(user, &what.namespace)
            .find(|grant| grant.rules.iter().any(|rule| rule.allows(what)));
        match allowed {
            Some(grant) => Decision::Allow(format!("RBAC: allowed by {}", grant.origin)),
            None => Decision::Deny(String::new()),
        }
    }

    /// All rules that a user has in a namespace (empty: at cluster scope).
    pub(crate) fn rules(&self, user: &User, namespace: &str) -> Vec<Rule> {
        let index = self.index();
        index.grants(user, namespace).flat_map(|grant| grant.rules.iter().cloned()).collect()
    }

    /// The rules that aggregated cluster roles should have, by name.
    pub(crate) fn aggregated(&self) -> BTreeMap<String, Vec<Rule>> {
        self.index().aggregated.clone()
    }

    /// The rules of the role that a binding names; none if there is no such role.
    pub(crate) fn rules_of_ref(&self, role_ref: &Value, namespace: &str) -> Option<Vec<Rule>> {
        let [roles, cluster_roles, ..] = self.ids?;
        let name = role_ref["name"].as_str()?;
        if role_ref["kind"] == "Role" {
            let item = self.cache.get(roles, &format!("{namespace}/{name}"))?;
            return Some(rules_of(&item.parse()));
        }
        if let Some(rules) = self.index().aggregated.get(name) {
            return Some(rules.clone());
        }
        Some(rules_of(&self.cache.get(cluster_roles, name)?.parse()))
    }
}

impl Index {
    fn build(cache: &Cache, ids: [usize; 4], made_of: [u64; 4]) -> Self {
        let [roles, cluster_roles, bindings, cluster_bindings] = ids.map(|id| cache.snapshot(id).objects);
        let parsed: Vec<(Arc<Item>, Value)> =
            cluster_roles.values().map(|item| (item.clone(), item.parse())).collect();
        let aggregated = aggregate(&parsed);
        let mut by_name: HashMap<String, Rules> =
            parsed.iter().map(|(item, role)| (item.name().to_owned(), Arc::new(rules_of(role)))).collect();
        for (name, rules) in &aggregated {
            by_name.insert(name.clone(), Arc::new(rules.clone()));
        }
        let mut index = Self { made_of, aggregated, ..Self::default() };
        for item in cluster_bindings.values() {
            let binding = item.parse();
            let Some(rules) = binding["roleRef"]["name"].as_str().and_then(|n| by_name.get(n)) else {
                continue;
            };
            index.cluster.add(&binding, rules, &format!("ClusterRoleBinding \"{}\"", item.name()));
        }
        for item in bindings.values() {
            let binding = item.parse();
            let name = binding["roleRef"]["name"].as_str().unwrap_or_default();
            let rules = if binding["roleRef"]["kind"] == "Role" {
                roles
                    .get(format!("{}/{name}", item.namespace()).as_str())
                    .map(|role| Arc::new(rules_of(&role.parse())))
            } else {
                by_name.get(name).cloned()
            };
            let Some(rules) = rules else { continue };
            let origin = format!("RoleBinding \"{}/{}\"", item.name(), item.namespace());
            index.namespaces.entry(item.namespace().to_owned()).or_default().add(&binding, &rules, &origin);
        }
        index
    }

    fn grants<'a>(&'a self, user: &'a User, namespace: &str) -> impl Iterator<Item = &'a Grant> {
        let namespaced = (!namespace.is_empty()).then(|| self.namespaces.get(namespace)).flatten();
        std::iter::once(&self.cluster).chain(namespaced).flat_map(|grants| {
            let of_user = grants.by_user.get(&user.name).into_iter().flatten();
            let of_groups = user.groups.iter().filter_map(|group| grants.by_group.get(group)).flatten();
            of_user.chain(of_groups)
        })
    }
}

impl Grants {
    fn add(&mut self, binding: &Value, rules: &Rules, origin: &str) {
        let (kind, name) = (binding["roleRef"]["kind"].as_str(), binding["roleRef"]["name"].as_str());
        let role = format!("{} \"{}\"", kind.unwrap_or_default(), name.unwrap_or_default());
        for subject in binding["subjects"].as_array().into_iter().flatten() {
            let name = subject["name"].as_str().unwrap_or_default();
            let namespace = subject["namespace"].as_str().unwrap_or_default();
            let kind = subject["kind"].as_str().unwrap_or_default();
            let (map, key, whom) = match kind {
                "User" => (&mut self.by_user, name.to_owned(), name.to_owned()),
                "Group" => (&mut self.by_group, name.to_owned(), name.to_owned()),
                "ServiceAccount" => (
                    &mut self.by_user,
                    format!("system:serviceaccount:{namespace}:{name}"),
                    format!("{name}/{namespace}"),
                ),
                _ => continue,
            };
            let origin = format!("{origin} of {role} to {kind} \"{whom}\"").into();
            map.entry(key).or_default().push(Grant { rules: rules.clone(), origin });
        }
    }
}

/// The rules of aggregated cluster roles: of all roles that their selectors match, several levels deep.
fn aggregate(roles: &[(Arc<Item>, Value)]) -> BTreeMap<String, Vec<Rule>> {
    /// Levels of aggregation that are followed; upstream's own roles have two.
    const LEVELS: usize = 4;
    let mut rules: BTreeMap<String, Vec<Rule>> =
        roles.iter().map(|(item, role)| (item.name().to_owned(), rules_of(role))).collect();
    let selectors: Vec<(&Arc<Item>, Vec<LabelSelector>)> = roles
        .iter()
        .filter_map(|(item, role)| {
            let terms = role["aggregationRule"]["clusterRoleSelectors"].as_array()?;
            Some((item, terms.iter().filter_map(|term| LabelSelector::from_value(Some(term)).ok()).collect()))
        })
        .collect();
    for _level in 0..LEVELS {
        for (item, terms) in &selectors {
            let mut sum: Vec<Rule> = Vec::new();
            for (other, _) in roles {
                let matches = terms.iter().any(|term| term.matches(&*other.labels));
                if matches && other.name() != item.name() {
                    for rule in rules.get(other.name()).into_iter().flatten() {
                        if !sum.contains(rule) {
                            sum.push(rule.clone());
                        }
                    }
                }
            }
            rules.insert(item.name().to_owned(), sum);
        }
    }
    selectors.iter().filter_map(|(item, _)| rules.remove_entry(item.name())).collect()
}

/// The rules of a role object.
pub(crate) fn rules_of(role: &Value) -> Vec<Rule> {
    let list = |value: &Value| -> Vec<String> {
        value.as_array().into_iter().flatten().filter_map(|v| v.as_str().map(str::to_owned)).collect()
    };
    role["rules"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|rule| Rule {
            verbs: list(&rule["verbs"]),
            api_groups: list(&rule["apiGroups"]),
            resources: list(&rule["resources"]),
            resource_names: list(&rule["resourceNames"]),
            non_resource_urls: list(&rule["nonResourceURLs"]),
        })
        .collect()
}

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|entry| entry == "*" || entry == wanted)
}

impl Rule {
    /// Whether the rule allows it.
    pub(crate) fn allows(&self, what: &Attributes) -> bool {
        if !has(&self.verbs, &what.verb) {
            return false;
        }
        if !what.is_resource {
            return self.non_resource_urls.iter().any(|url| match url.strip_suffix('*') {
                Some(prefix) => what.path.starts_with(prefix),
                None => *url == what.path,
            });
        }
        has(&self.api_groups, &what.group)
            && self.resources.iter().any(|entry| resource_matches(entry, what))
            && (self.resource_names.is_empty() || self.resource_names.contains(&what.name))
    }

    /// Whether everything that `other` allows is allowed by one of `rules`; for the escalation check.
    pub(crate) fn covered_by(&self, rules: &[Self]) -> bool {
        let mut single = Vec::new();
        for verb in &self.verbs {
            for url in &self.non_resource_urls {
                single.push(Attributes { verb: verb.clone(), path: url.clone(), ..Attributes::default() });
            }
            for group in &self.api_groups {
                for resource in &self.resources {
                    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
                    let one = Attributes {
                        verb: verb.clone(),
                        group: group.clone(),
                        resource: resource.to_owned(),
                        subresource: subresource.to_owned(),
                        is_resource: true,
                        ..Attributes::default()
                    };
                    if self.resource_names.is_empty() {
                        single.push(one);
                    } else {
                        let named = self.resource_names.iter();
                        single.extend(named.map(|name| Attributes { name: name.clone(), ..one.clone() }));
                    }
                }
            }
        }
        single.iter().all(|what| rules.iter().any(|rule| rule.allows(what)))
    }
}

fn resource_matches(entry: &str, what: &Attributes) -> bool {
    match entry.split_once('/') {
        _ if entry == "*" => true,
        Some(("*", subresource)) => !what.subresource.is_empty() && subresource == what.subresource,
        Some((resource, subresource)) => resource == what.resource && subresource == what.subresource,
        None => what.subresource.is_empty() && entry == what.resource,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn what(verb: &str, group: &str, resource: &str, subresource: &str, name: &str) -> Attributes {
        Attributes {
            verb: verb.into(),
            group: group.into(),
            resource: resource.into(),
            subresource: subresource.into(),
            name: name.into(),
            is_resource: true,
            ..Attributes::default()
        }
    }

    #[test]
    fn rules() {
        let role = json!({"rules": [
            {"verbs": ["get"], "apiGroups": [""], "resources": ["pods", "pods/log"]},
            {"verbs": ["*"], "apiGroups": ["apps"], "resources": ["*/scale"]},
            {"verbs": ["get"], "apiGroups": [""], "resources": ["secrets"], "resourceNames": ["a"]},
            {"verbs": ["get"], "nonResourceURLs": ["/healthz", "/api/*"]},
        ]});
        let rules = rules_of(&role);
        let allowed = |w: &Attributes| rules.iter().any(|r| r.allows(w));
        assert!(allowed(&what("get", "", "pods", "", "x")));
        assert!(allowed(&what("get", "", "pods", "log", "x")));
        assert!(!allowed(&what("get", "", "pods", "exec", "x")));
        assert!(!allowed(&what("list", "", "pods", "", "")));
        assert!(allowed(&what("update", "apps", "deployments", "scale", "x")));
        assert!(!allowed(&what("update", "apps", "deployments", "", "x")));
        assert!(allowed(&what("get", "", "secrets", "", "a")));
        assert!(!allowed(&what("get", "", "secrets", "", "b")));
        let path = |p: &str| Attributes { verb: "get".into(), path: p.into(), ..Attributes::default() };
        assert!(allowed(&path("/healthz")) && allowed(&path("/api/v1")) && !allowed(&path("/metrics")));
    }

    #[test]
    fn cover() {
        let some = rules_of(
            &json!({"rules": [{"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"]}]}),
        );
        let all = rules_of(&json!({"rules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}]}));
        assert!(some[0].covered_by(&all));
        assert!(!all[0].covered_by(&some));
    }
}
