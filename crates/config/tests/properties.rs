//! Properties of the grammar against arbitrary text.

use hospes_config::{Document, Source, fuzz, known_keys, load};
use proptest::prelude::*;

fn source(text: &str) -> Source<'_> {
    Source {
        name: "p.cfg",
        text,
    }
}

/// Values as they are written, nested up to three deep.
fn value() -> impl Strategy<Value = String> {
    let atom = prop_oneof![
        "[0-9][0-9a-fx]{0,8}",
        "[^'\\\\\\n\\x00]{0,12}".prop_map(|text| format!("'{text}'")),
        "[^\"\\\\\\n\\x00]{0,12}".prop_map(|text| format!("\"{text}\"")),
        prop_oneof!["\\\\n", "\\\\x[1-7][0-9a-f]", "\\\\1[0-7]{2}", "\\\\'"]
            .prop_map(|text| format!("\"{text}\"")),
    ];
    atom.prop_recursive(3, 16, 4, |inner| {
        prop::collection::vec(inner, 0..4)
            .prop_map(|items| format!("[ {} ]", items.join(" ,\n # c\n ")))
    })
}

fn name() -> impl Strategy<Value = String> {
    let known: Vec<&str> = known_keys().map(|key| key.name).collect();
    prop_oneof![
        prop::sample::select(known).prop_map(String::from),
        "[a-z][._0-9a-z]{0,8}"
    ]
}

fn settings() -> impl Strategy<Value = String> {
    let setting = (
        name(),
        prop_oneof!["=", " = ", "=", "\\+="],
        value(),
        prop_oneof!["\n", ";", " # c\n"],
    );
    prop::collection::vec(
        setting.prop_map(|(name, op, value, end)| format!("{name}{op}{value}{end}")),
        0..12,
    )
    .prop_map(|lines| lines.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn load_any_text_does_not_panic(text in "[ -~\\n\\t\\r\"'\\\\=+\\[\\],;#0-9a-zé]{0,200}") {
        fuzz(text.as_bytes());
    }

    #[test]
    fn load_any_bytes_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        fuzz(&bytes);
    }

    #[test]
    fn load_likely_settings_does_not_panic(text in settings()) {
        fuzz(text.as_bytes());
        let _ = load(&[source("name='d'; kernel='/k'"), source(&text)]);
    }

    #[test]
    fn read_distinct_settings_prints_and_reads_back(values in prop::collection::vec(value(), 0..8)) {
        let text: String = values.iter().enumerate().map(|(i, value)| format!("k{i}={value}\n")).collect();
        let mut faults = Vec::new();
        let mut document = Document::default();
        document.read(source(&text), &mut faults);
        prop_assert!(faults.is_empty(), "{faults:?} in {text:?}");
        prop_assert_eq!(document.settings().len(), values.len());
        let printed = document.to_string();
        let mut again = Document::default();
        again.read(source(&printed), &mut faults);
        prop_assert!(faults.is_empty(), "{faults:?} in {printed:?}");
        prop_assert!(again.same_settings(&document), "{printed:?}");
    }
}
