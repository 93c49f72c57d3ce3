//! What a machine may say, and what is made of it.

use super::*;

const RUN: Run = Run {
    name: "builtin",
    package: "agent/runtime",
    test: "builtin",
    args: &[],
    tests: &[],
    lacks: &[("xdp", "older than 6.3")],
};
const GOOD: &str = "running 3 tests\ntest a::b ... ok\ntest c ... ok\ntest victim ... ignored, of another\n\n\
    test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 142.71s\n";
const BAD: &str = "running 2 tests\ntest a ... FAILED\ntest b ... ok\n\nfailures:\n\n---- a stdout ----\nit broke\n\n\
    test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s\n";

fn said(output: &str) -> Said {
    Said { output: output.to_owned(), console: "a\nKernel panic\n".to_owned(), late: false }
}

fn line(mark: &Mark) -> String {
    format!("\n{}\n", mark.line().unwrap())
}

fn begin() -> String {
    line(&Mark::Begin { program: "builtin".to_owned() })
}

fn end(wrong: Option<&str>) -> String {
    line(&Mark::End { program: "builtin".to_owned(), wrong: wrong.map(str::to_owned) })
}

fn skip(text: &str) -> String {
    line(&Mark::Skip { line: text.to_owned() })
}

fn done() -> String {
    line(&Mark::Done)
}

fn judged(tests: &[&str], said: &Said) -> Outcome {
    let program = Program {
        name: RUN.name.to_owned(),
        path: "/builtin".into(),
        folder: "/".into(),
        args: Vec::new(),
        tests: tests.iter().map(|name| (*name).to_owned()).collect(),
    };
    judge(&[&RUN], &[program], said)
}

fn wrong(output: &str) -> Vec<String> {
    judged(&[], &said(output)).wrong
}

#[test]
fn what_went_well_is_counted() {
    let outcome = judged(&[], &said(&[begin(), GOOD.to_owned(), end(None), done()].concat()));
    assert_eq!(outcome.wrong, Vec::<String>::new());
    assert_eq!(outcome.summary, ["builtin: 2 passed, 0 failed, 0 skipped, 1 ignored"]);
}

#[test]
fn a_failure_says_what_the_test_said() {
    let wrong = wrong(&[begin(), BAD.to_owned(), end(Some("it failed (exit status: 101)")), done()].concat());
    assert_eq!(wrong.len(), 1);
    assert!(wrong[0].starts_with("builtin: it failed (exit status: 101)\n  failures:\n"), "{wrong:?}");
    assert!(wrong[0].contains("  it broke"), "{wrong:?}");
}

#[test]
fn a_failed_test_counts_whatever_the_program_returns() {
    assert_eq!(wrong(&[begin(), BAD.to_owned(), end(None), done()].concat()).len(), 1);
    assert_eq!(wrong(&[begin(), GOOD.to_owned(), end(Some("killed")), done()].concat()).len(), 1);
}

#[test]
fn only_skips_that_are_expected_are_let_pass() {
    let expected = skip("SKIP dataplane::xdp: needs xdp: Linux 6.1 is older than 6.3");
    let outcome = judged(&[], &said(&[begin(), GOOD.to_owned(), expected, end(None), done()].concat()));
    assert_eq!(outcome.wrong, Vec::<String>::new());
    assert_eq!(outcome.summary[0], "builtin: 1 passed, 0 failed, 1 skipped, 1 ignored");
    let other = skip("SKIP a: needs xdpx: none");
    assert!(wrong(&[begin(), GOOD.to_owned(), other, end(None), done()].concat())[0].contains("SKIP a"));
}

#[test]
fn a_program_that_only_skips_is_wrong() {
    let skips = skip("SKIP a: needs xdp: x").repeat(2);
    assert_eq!(
        wrong(&[begin(), GOOD.to_owned(), skips, end(None), done()].concat()),
        ["builtin ran no test"]
    );
}

#[test]
fn a_machine_that_ends_early_is_wrong() {
    let lost = wrong(&[begin(), "running 3 tests\ntest a ... ok\n".to_owned()].concat());
    assert_eq!(lost.len(), 2, "{lost:?}");
    assert!(lost[0].starts_with("builtin told no result") && lost[0].contains("test a ... ok"), "{lost:?}");
    assert!(lost[1].contains("Kernel panic"), "{lost:?}");
    assert!(wrong("")[0].contains("was not begun"));
    assert_eq!(wrong(&[begin(), GOOD.to_owned(), done()].concat()), ["builtin did not come to its end"]);
}

#[test]
fn a_machine_that_hung_is_wrong() {
    let mut said = said(&[begin(), GOOD.to_owned(), end(None), done()].concat());
    said.late = true;
    assert_eq!(judged(&[], &said).wrong.len(), 1);
}

#[test]
fn a_name_that_no_test_has_is_wrong() {
    let said = said(&[begin(), GOOD.to_owned(), end(None), done()].concat());
    assert_eq!(judged(&["a::"], &said).wrong, Vec::<String>::new());
    assert_eq!(judged(&["a::", "gone::"], &said).wrong, ["builtin has no test gone::"]);
}
