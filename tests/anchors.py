"""The anchors of a Markdown page, for the scripts that check links to them."""

import re


def anchors(text):
    """The anchors that GitHub makes of headings, and those that the text sets itself."""
    headings = [heading.replace("`", "") for heading in re.findall(r"^#+ (.*?) *$", text, re.M)]
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"<a id=\"([\w-]+)\"", text))
