//! `docs/kinds.md` says what each kind lacks; it is made from the code, and this test holds it to it.

use std::fmt::Write as _;
use std::path::Path;

#[test]
fn the_page_says_what_the_code_lacks() {
    let mut page = String::from(
        "# Kinds\n\nEvery kind that Kubernetes 1.36 serves by default is stored, listed, watched, patched and printed, and its metadata is\n\
         validated in full. These lack something beyond that; the others have their full defaulting and validation. The page is made\n\
         from `strategy::partial_kinds` (`WEFT_UPDATE_DOCS=1 cargo test -p weft-control-api --test kinds_doc`).\n\n\
         | kind | what is missing |\n| --- | --- |\n",
    );
    for (kind, missing) in weft_control_api::strategy::partial_kinds() {
        writeln!(page, "| {kind} | {missing} |").unwrap();
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/kinds.md");
    if std::env::var_os("WEFT_UPDATE_DOCS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap_or_default(), page);
}
