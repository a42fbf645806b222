"""What people do in pages to have their chats on several devices."""

from browsing import button, expect, menu


def choose(page):
    menu(page, "Chats on all your devices")
    return page.get_by_role("dialog", name="Chats on all your devices")


def keep(page):
    dialog = choose(page)
    button(dialog, "Keep them").click()
    expect(dialog.locator("#sync-link")).to_be_visible()
    button(dialog, "Done").click()
    expect(dialog).to_be_hidden()


def link_of(page):
    dialog = choose(page)
    link = dialog.locator("#sync-link").inner_text()
    button(dialog, "Done").click()
    return link


def join(page, link):
    page.goto("about:blank")
    page.goto(link)
    dialog = page.get_by_role("dialog", name="Chats on all your devices")
    button(dialog, "Keep them").click()
    expect(dialog).to_be_hidden()


def keep_and_join(page, *others):
    """Keep the chats of a page on the server, and have other devices join."""
    keep(page)
    link = link_of(page)
    for other in others:
        join(other, link)
