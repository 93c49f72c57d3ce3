//! Owns service-account tokens: what they claim, and whether what they are bound to is still there.

use super::jwt::{KeyError, TokenKeys};
use crate::cache::Cache;
use crate::identity::User;
use serde_json::{Value, json};
use std::sync::Arc;

const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const NODE_UID: &str = "authentication.kubernetes.io/node-uid";
const CREDENTIAL_ID: &str = "authentication.kubernetes.io/credential-id";

/// Something that a token is bound to: it is worthless when that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BoundObject {
    /// Its name.
    pub(crate) name: String,
    /// Its uid.
    pub(crate) uid: String,
}

/// What a token is made of.
#[derive(Clone, Debug)]
pub(crate) struct Claims {
    /// The service account's namespace.
    pub(crate) namespace: String,
    /// The service account.
    pub(crate) account: BoundObject,
    /// For whom the token is.
    pub(crate) audiences: Vec<String>,
    /// How long it is good, in seconds.
    pub(crate) seconds: i64,
    /// The pod it is bound to.
    pub(crate) pod: Option<BoundObject>,
    /// The node of that pod, or the node it is bound to.
    pub(crate) node: Option<BoundObject>,
    /// The secret it is bound to.
    pub(crate) secret: Option<BoundObject>,
}

/// Why a token isn't good.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum TokenError {
    /// Not signed by one of the cluster's keys.
    #[error("the token is not signed by this cluster")]
    Signature,
    /// A claim is missing or isn't right.
    #[error("the token's claim {0} is not right")]
    Claim(&'static str),
    /// Not good yet, or not any more.
    #[error("the token has expired or is not valid yet")]
    Time,
    /// Meant for somebody else.
    #[error("the token is for another audience")]
    Audience,
    /// What the token is bound to is gone.
    #[error("the {0} of the token is gone")]
    Gone(&'static str),
}

/// Makes and checks service-account tokens.
pub(crate) struct Tokens {
    keys: TokenKeys,
    issuer: String,
    audiences: Vec<String>,
    cache: Arc<Cache>,
}

impl Tokens {
    /// Tokens of an issuer for the server's audiences.
    pub(crate) fn new(keys: TokenKeys, issuer: String, audiences: Vec<String>, cache: Arc<Cache>) -> Self {
        Self { keys, issuer, audiences, cache }
    }

    /// The audiences of this server.
    pub(crate) fn audiences(&self) -> &[String] {
        &self.audiences
    }

    /// The issuer.
    pub(crate) fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The public keys.
    pub(crate) fn keys(&self) -> &TokenKeys {
        &self.keys
    }

    /// Makes a token.
    pub(crate) fn issue(&self, claims: &Claims) -> Result<String, KeyError> {
        let now = jiff::Timestamp::now().as_second();
        let bound = |o: &BoundObject| json!({"name": o.name, "uid": o.uid});
        let mut kubernetes = json!({"namespace": claims.namespace, "serviceaccount": bound(&claims.account)});
        for (key, object) in [("pod", &claims.pod), ("node", &claims.node), ("secret", &claims.secret)] {
            if let Some(object) = object {
                kubernetes[key] = bound(object);
            }
        }
        self.keys.sign(&json!({
            "aud": claims.audiences,
            "exp": now + claims.seconds,
            "iat": now,
            "iss": self.issuer,
            "jti": uuid::Uuid::new_v4().to_string(),
            "kubernetes.io": kubernetes,
            "nbf": now,
            "sub": format!("system:serviceaccount:{}:{}", claims.namespace, claims.account.name),
        }))
    }

    /// The user of a token for one of `audiences` (none: this server's), and the audiences that matched.
    pub(crate) fn authenticate(
        &self,
        token: &str,
        audiences: Option<&[String]>,
    ) -> Result<(User, Vec<String>), TokenError> {
        let claims = self.keys.verify(token).ok_or(TokenError::Signature)?;
        if claims["iss"] != self.issuer.as_str() {
            return Err(TokenError::Claim("iss"));
        }
        let now = jiff::Timestamp::now().as_second();
        let time = |key| claims[key].as_i64();
        if time("exp").ok_or(TokenError::Claim("exp"))? <= now || time("nbf").unwrap_or(0) > now + 10 {
            return Err(TokenError::Time);
        }
        let wanted = audiences.unwrap_or(&self.audiences);
        let matched: Vec<String> = claims["aud"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .filter(|audience| wanted.iter().any(|w| w == audience))
            .map(str::to_owned)
            .collect();
        if matched.is_empty() {
            return Err(TokenError::Audience);
        }
        Ok((self.user_of(&claims)?, matched))
    }

    fn user_of(&self, claims: &Value) -> Result<User, TokenError> {
        let kubernetes = &claims["kubernetes.io"];
        let namespace = kubernetes["namespace"].as_str().ok_or(TokenError::Claim("kubernetes.io"))?;
        let account =
            bound_object(&kubernetes["serviceaccount"]).ok_or(TokenError::Claim("kubernetes.io"))?;
        if claims["sub"] != format!("system:serviceaccount:{namespace}:{}", account.name) {
            return Err(TokenError::Claim("sub"));
        }
        self.check(namespace, "serviceaccounts", &account).ok_or(TokenError::Gone("service account"))?;
        let mut user = User::service_account(namespace, &account.name, &account.uid);
        if let Some(secret) = bound_object(&kubernetes["secret"]) {
            self.check(namespace, "secrets", &secret).ok_or(TokenError::Gone("secret"))?;
        }
        let pod = bound_object(&kubernetes["pod"]);
        if let Some(pod) = &pod {
            self.check(namespace, "pods", pod).ok_or(TokenError::Gone("pod"))?;
            user.extra.insert(POD_NAME.into(), vec![pod.name.clone()]);
            user.extra.insert(POD_UID.into(), vec![pod.uid.clone()]);
        }
        if let Some(node) = bound_object(&kubernetes["node"]) {
            // With a pod the node is information only; alone the token is bound to it.
            if pod.is_none() {
                self.check("", "nodes", &node).ok_or(TokenError::Gone("node"))?;
            }
            user.extra.insert(NODE_NAME.into(), vec![node.name.clone()]);
            user.extra.insert(NODE_UID.into(), vec![node.uid.clone()]);
        }
        if let Some(id) = claims["jti"].as_str() {
            user.extra.insert(CREDENTIAL_ID.into(), vec![format!("JTI={id}")]);
        }
        Ok(user)
    }

    fn check(&self, namespace: &str, plural: &str, object: &BoundObject) -> Option<()> {
        let resource = self.cache.resources().by_plural("", plural)?;
        let key =
            if namespace.is_empty() { object.name.clone() } else { format!("{namespace}/{}", object.name) };
        let item = self.cache.get(resource.id, &key)?;
        (*item.uid == *object.uid).then_some(())
    }
}

fn bound_object(value: &Value) -> Option<BoundObject> {
    Some(BoundObject { name: value["name"].as_str()?.to_owned(), uid: value["uid"].as_str()?.to_owned() })
}
