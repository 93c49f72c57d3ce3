//! The server over real TLS: who may enter, and what logs answer.

use super::*;

#[test]
fn queries_are_decoded() {
    let request = Request::builder().uri("/exec/a/b/c?command=sh&command=-c&command=a%20b&tty=true&input=1").body(Body::empty()).unwrap();
    let query = Query::of(&request);
    assert_eq!(query.all("command"), ["sh", "-c", "a b"]);
    assert!(query.flag(&["tty"]) && query.flag(&["input", "stdin"]) && !query.flag(&["output"]));
}
